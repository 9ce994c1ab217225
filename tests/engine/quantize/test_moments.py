"""Second moments of inputs and their damping."""

import pytest
import torch

from anybit.engine.quantize.calibrate.moments import InputMoments, damp


def moments_of(x: torch.Tensor) -> InputMoments:
    moments = InputMoments(x.shape[-1], torch.device("cpu"))
    moments.add(x)
    return moments


def test_moments_are_those_of_all_tokens_whatever_the_batches():
    x = torch.randn(3, 700, 16)
    moments = InputMoments(16, torch.device("cpu"))
    for part in x:
        moments.add(part)
    rows = x.view(-1, 16).double()
    assert moments.num_tokens == 2100
    assert moments.hessian.dtype == torch.float64
    assert torch.allclose(moments.hessian, rows.T @ rows / 2100, atol=1e-5)
    assert torch.allclose(moments.mean, rows.mean(0), atol=1e-6)


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    x = torch.randn(50, 8)
    spoiled = torch.cat([x, torch.full((1, 8), float("nan")), torch.full((2, 8), float("inf"))])
    moments = moments_of(spoiled)
    assert (moments.num_tokens, moments.num_skipped) == (50, 3)
    assert torch.equal(moments.hessian, moments_of(x).hessian)


def test_too_few_tokens_are_noticed_and_damping_makes_up_for_them():
    moments = moments_of(torch.randn(5, 16))
    assert not moments.is_full_rank
    damped = damp(moments.hessian, 0.01)
    assert damped.damping == 0.01
    identity = damped.matrix @ (damped.inverse_factor.T @ damped.inverse_factor)
    assert torch.allclose(identity, torch.eye(16, dtype=torch.float64), atol=1e-8)
    assert torch.equal(damped.inverse_factor, damped.inverse_factor.triu())


def test_an_indefinite_matrix_is_damped_until_it_is_not():
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.2], dtype=torch.float64))
    matrix[0, 1] = matrix[1, 0] = 1.05
    damped = damp(matrix, 0.001)
    assert damped.damping > 0.001
    assert torch.isfinite(damped.inverse_factor).all()


def test_inputs_that_are_always_zero_keep_a_diagonal():
    x = torch.randn(100, 8)
    x[:, 3] = 0
    damped = damp(moments_of(x).hessian, 0.0)
    assert damped.matrix[3, 3] == 1


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ArithmeticError):
        damp(torch.full((4, 4), float("nan"), dtype=torch.float64), 0.01)


def test_rescaling_the_inputs_rescales_matrix_and_factor():
    x = torch.randn(200, 8)
    factors = torch.rand(8) + 0.5
    damped = damp(moments_of(x).hessian, 0.01).rescaled(factors)
    product = damped.matrix @ (damped.inverse_factor.T @ damped.inverse_factor)
    assert torch.allclose(product, torch.eye(8, dtype=torch.float64), atol=1e-6)
    assert torch.equal(damped.inverse_factor, damped.inverse_factor.triu())
