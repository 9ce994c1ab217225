"""The integer step of the solvers: native, Triton (interpreted) and portable kernels against the oracle."""

import pytest
import torch

from anybit.kernels import reference
from anybit.kernels.cpu import choose_codes as cpu
from anybit.kernels.cpu.bindings import instruction_sets, is_native, select_instruction_set, selected_instruction_set
from anybit.kernels.portable import choose_codes as portable
from tests.fixtures.native import native_only

SHAPES = {
    "one width": ((0,), 2, 5, 16),
    "three widths": ((2, 1, 0), 4, 7, 64),
    "all widths of a byte": ((6, 5, 4, 2, 0), 8, 5, 32),
    "a long group": ((2, 0), 4, 3, 128),
    "one width of six bits": ((0,), 6, 5, 32),
}


def problem(shape: str, with_origin: bool, device: str = "cpu"):
    shifts, code_bits, rows, columns = SHAPES[shape]
    widths = len(shifts)
    step = torch.rand(widths, rows) * 0.2 + 0.1
    step *= torch.tensor([2.0**shift for shift in shifts])[:, None] * 16 / 2**code_bits
    tensors = (
        torch.randn(widths, rows, columns),
        torch.randn(widths, rows, columns) if with_origin else None,
        torch.randn(widths, columns, columns) * 0.1,
        torch.rand(widths, columns) + 0.1,
        step,
        -step * ((2.0 ** torch.tensor([code_bits - s for s in shifts]) - 1) / 2)[:, None],
    )
    return *(None if tensor is None else tensor.to(device) for tensor in tensors), shifts, 1 << code_bits


def check(kernel, shape: str, with_origin: bool, device: str = "cpu"):
    arguments = problem(shape, with_origin, device)
    on_cpu = [argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    expected, margins = reference.choose_codes(*on_cpu)
    targets, _, _, _, scale, zero, shifts, _ = arguments
    codes, values = kernel(*arguments)
    # Where two codes are as good but for rounding either will do, and what follows in that row may then differ.
    decided = (margins > 1e-5).cummin(1).values
    assert decided.double().mean() > 0.2
    assert torch.equal(codes.cpu()[decided], expected[decided])
    levels = torch.stack([(codes >> shift).float() for shift in shifts])
    assert torch.allclose(values, levels * scale[:, :, None] + zero[:, :, None], atol=1e-5)
    assert torch.isfinite(targets).all()


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_portable(shape, with_origin):
    check(portable.choose_codes, shape, with_origin)


@native_only
@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_native(shape, with_origin):
    check(cpu.choose_codes, shape, with_origin)


@native_only
@pytest.mark.parametrize("num_codes", [32, 64, 256])
def test_the_nearest_of_many_codes_is_found_without_trying_all(num_codes):
    targets, weights = 3 * torch.randn(1, 9, 64), torch.rand(1, 64) + 0.1
    scale = torch.rand(1, 9) * 8 / num_codes
    scale[0, 3], scale[0, 5] = 0.0, -scale[0, 5]
    zero, coupling = -scale * num_codes / 2, torch.zeros(1, 64, 64)
    _, values = cpu.choose_codes(targets.clone(), None, coupling, weights, scale, zero, (0,), num_codes)
    levels = torch.arange(num_codes)[:, None, None] * scale[0, :, None] + zero[0, :, None]
    nearest = (levels - targets[0]).abs().amin(0)
    assert torch.allclose((values - targets)[0].abs(), nearest, rtol=0, atol=1e-5)


@native_only
def test_every_instruction_set_gives_the_same_codes():
    arguments = problem("three widths", with_origin=True)
    before = selected_instruction_set()
    results = []
    for name in instruction_sets():
        select_instruction_set(name)
        targets = arguments[0].clone()
        results.append((*cpu.choose_codes(targets, *arguments[1:]), targets))
    select_instruction_set(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("shape", ["one width", "three widths"])
def test_triton(shape, with_origin):
    triton_codes = pytest.importorskip("anybit.kernels.triton.choose_codes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(triton_codes.choose_codes, shape, with_origin, device)


def test_targets_that_are_views_are_changed_in_place():
    arguments = problem("three widths", with_origin=False)
    wide = torch.randn(3, 7, 128)
    wide[:, :, 64:] = arguments[0]
    portable_targets, native_targets = arguments[0].clone(), wide[:, :, 64:]
    portable.choose_codes(portable_targets, *arguments[1:])
    if is_native():
        cpu.choose_codes(native_targets, *arguments[1:])
        assert torch.allclose(wide[:, :, 64:], portable_targets, atol=1e-5)
