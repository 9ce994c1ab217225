"""Training in mixed precision: where a processor has units for it, and what it changes."""

import pytest
import torch

from anybit.engine.quantize.solve import precision
from anybit.engine.quantize.solve.precision import training_products

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    precision._has_units.cache_clear()
    yield
    precision._has_units.cache_clear()


@pytest.mark.parametrize(("flags", "expected"), [(["avx2"], torch.float32), (["avx2", "avx512_bf16"], torch.bfloat16)])
def test_products_are_in_bfloat16_only_where_there_are_units_for_it(monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    with training_products(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_sums_and_gradients_stay_float32(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: ["amx_bf16"])
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 64, generator=generator), torch.randn(32, 64, generator=generator, requires_grad=True)
    residual = torch.randn(40, 32, generator=generator)
    with training_products(CPU):
        y = residual + torch.nn.functional.linear(x, weight)
    y.square().sum().backward()
    assert y.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    expected = 2 * (residual + x @ weight.detach().T).T @ x
    assert (weight.grad - expected).norm() < 0.01 * expected.norm()
