"""The native CPU kernels against the oracle, on every instruction set that runs here; all give the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.kernels import layout, reference
from anybit.kernels.cpu import bindings, packed
from anybit.kernels.nested import Affine, NestedWeight
from anybit.kernels.portable import greedy as portable_greedy
from anybit.kernels.portable import norm as portable_norm
from tests.fixtures.native import native_only
from tests.fixtures.nested import random_nested, with_noise_below

pytestmark = native_only

# [out, in, group]: SmolLM2, Qwen2.5-0.5B, rows of Llama-3-8B, and odd sizes.
SHAPES = [
    (960, 576, 64),
    (576, 1536, 128),
    (1152, 896, 128),
    (48, 4864, 128),
    (256, 4096, 128),
    (32, 14336, 128),
    (40, 96, 32),
    (8, 32, 32),
    (100, 160, 32),
]
WEIGHT = random_nested(72, 192, 64)
INSTRUCTION_SETS = bindings.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    bindings.select_instruction_set(request.param)
    yield request.param
    bindings.select_instruction_set(INSTRUCTION_SETS[0])


@pytest.fixture(params=[1, 3])
def threads(request):
    before = bindings.get_threads()
    bindings.set_threads(request.param)
    yield
    bindings.set_threads(before)


def inputs(rows, in_features, seed=0):
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11])
def test_linear_is_the_oracles_but_for_the_activations_fifteen_bits(instruction_set, shape, rows):
    weight = random_nested(*shape)
    native = packed.pack(weight)
    x = inputs(rows, shape[1], rows)
    for width in layout.BIT_WIDTHS:
        expected = x.double() @ reference.dequantize(weight, width).double().T
        assert relative_error(packed.linear(x, native, [(width, 0, rows)]), expected) < 2e-4


def test_whole_numbers_are_multiplied_without_error(instruction_set):
    """Activations that two digits hold exactly leave nothing but float32's rounding."""
    weight = random_nested(48, 128, 64)
    native = packed.pack(weight)
    largest = 127 * 128 + 63
    x = torch.randint(-largest, largest + 1, (5, 128), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::64] = largest  # one step of exactly 1 in every group
    x[:, 1::64] = -largest
    for width in layout.BIT_WIDTHS:
        expected = x.double() @ reference.dequantize(weight, width).double().T
        assert relative_error(packed.linear(x, native, [(width, 0, 5)]), expected) < 1e-5


def test_largest_codes_and_activations_overflow_nothing(instruction_set):
    """Every code and every activation as large as it can be, the other sign in every second row."""
    codes = torch.full((32, 1024), 255, dtype=torch.uint8)
    ones = torch.ones(1024 // 128, 32, dtype=torch.float32)
    weight = NestedWeight(
        32, 1024, 128, layout.pack(codes), {width: Affine(ones, -ones) for width in layout.BIT_WIDTHS}
    )
    x = torch.ones(6, 1024)
    x[1::2] = -1
    for width in layout.BIT_WIDTHS:
        expected = x.double() @ reference.dequantize(weight, width).double().T
        for rows in (1, 2, 6):
            actual = packed.linear(x[:rows], packed.pack(weight), [(width, 0, rows)])
            assert relative_error(actual, expected[:rows]) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(shape):
    native, x = packed.pack(random_nested(*shape)), inputs(13, shape[1])
    segments = [(2, 0, 1), (3, 1, 3), (4, 3, 6), (6, 6, 7), (8, 7, 13)]
    before = bindings.get_threads()
    results = []
    for name in INSTRUCTION_SETS:
        bindings.select_instruction_set(name)
        for count in (1, 2, 3):
            bindings.set_threads(count)
            results.append(packed.linear(x, native, segments))
    bindings.set_threads(before)
    bindings.select_instruction_set(INSTRUCTION_SETS[0])
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(layout.BIT_WIDTHS), st.integers(1, 9)), min_size=1, max_size=5))
def test_a_row_is_the_same_alone_and_in_any_batch(parts):
    native = packed.pack(WEIGHT)
    segments, start = [], 0
    for width, count in sorted(parts):
        segments.append((width, start, start + count))
        start += count
    x = inputs(start, WEIGHT.in_features, start)
    together = packed.linear(x, native, segments)
    for width, first, last in segments:
        for row in range(first, last):
            assert torch.equal(packed.linear(x[row : row + 1], native, [(width, 0, 1)])[0], together[row])


def test_bias_is_added_once(threads):
    native, x = packed.pack(WEIGHT), inputs(3, 192)
    bias = torch.randn(72, generator=torch.Generator().manual_seed(2))
    plain = packed.linear(x, native, [(4, 0, 3)])
    assert torch.equal(packed.linear(x, native, [(4, 0, 3)], bias), plain + bias)


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_streams_below_a_width_are_not_read(width):
    x = inputs(2, 192)
    expected = packed.linear(x, packed.pack(WEIGHT), [(width, 0, 2)])
    noisy = packed.pack(with_noise_below(WEIGHT, width))
    assert torch.equal(packed.linear(x, noisy, [(width, 0, 2)]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_embedding_rows_are_the_oracles(dtype):
    weight = random_nested(100, 96, 32, float_dtype=dtype)
    native, ids = packed.pack(weight), torch.tensor([0, 99, 17, 17])
    for width in layout.BIT_WIDTHS:
        expected = reference.dequantize(weight, width)[ids].float()
        assert torch.allclose(packed.embedding(ids, native, width), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_stays_so_and_spoils_no_other(instruction_set, bad):
    native, x = packed.pack(WEIGHT), inputs(4, 192)
    expected = packed.linear(x, native, [(4, 0, 4)])
    x[2, 50] = bad
    actual = packed.linear(x, native, [(4, 0, 4)])
    assert actual[2].isnan().all()
    assert torch.equal(actual[[0, 1, 3]], expected[[0, 1, 3]])


def test_zeros_give_zeros():
    assert not packed.linear(torch.zeros(2, 192), packed.pack(WEIGHT), [(8, 0, 2)]).any()


def test_activation_error_is_what_the_readme_states(instruction_set):
    """Normal activations and a weight of ones on one input a row: what comes out is the activations, rounded."""
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    codes.fill_diagonal_(255)
    scale, zero = torch.full((1, 128), 1 / 15), torch.zeros(1, 128)
    weight = packed.pack(NestedWeight(128, 128, 128, layout.pack(codes), {4: Affine(scale, zero)}))
    x = inputs(64, 128)
    assert relative_error(packed.linear(x, weight, [(4, 0, 64)]), x.double()) < 6e-5


def test_width_that_was_not_loaded_is_refused():
    weight = random_nested(16, 64, 64, bit_widths=(2, 4))
    with pytest.raises(ValueError, match="not loaded at 8 bits"):
        packed.linear(inputs(1, 64), packed.pack(weight), [(8, 0, 1)])


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'abacus' does not run here"):
        bindings.select_instruction_set("abacus")


def test_greedy_is_the_portable_one(instruction_set, threads):
    logits = inputs(5, 1003, 9)
    logits[1, 17] = logits[1, 940] = 50.0  # the first of equals
    logits[2, 1002] = 60.0
    logits[3, 400] = float("nan")
    logits[4, 0] = -float("inf")
    assert torch.equal(packed.greedy(logits), portable_greedy.greedy(logits))
    assert packed.greedy(logits).tolist()[1:] == [17, 1002, -1, -1]


@pytest.mark.parametrize("size", [16, 576, 896])
def test_rms_norm_is_the_portable_one(instruction_set, size):
    x, weight = inputs(3, size, 3) * 4, inputs(1, size, 4)[0]
    assert torch.allclose(packed.rms_norm(x, weight, 1e-5), portable_norm.rms_norm(x, weight, 1e-5), atol=1e-5)
