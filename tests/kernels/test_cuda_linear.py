"""The GPU's linear layers against the oracle, and the promise that a row does not depend on its neighbours."""

from dataclasses import replace

import pytest
import torch

from anybit.kernels import dispatch, layout, reference
from anybit.kernels.cuda import fragments
from anybit.kernels.cuda import linear as cuda
from anybit.kernels.cuda.activations import InputForm, num_token_tiles, prepare_activations
from anybit.kernels.cuda.driver import has_warpgroups
from anybit.kernels.cuda.tuning import Tiling, default_tiling, num_segments
from anybit.kernels.cuda.warpgroup_linear import multiply_batch, multiply_values
from anybit.kernels.cuda.warpgroup_tuning import BatchTiling, ValuesTiling
from anybit.kernels.nested import Affine, NestedWeight
from tests.fixtures.nested import normal, random_nested, with_noise_below, without_below

pytestmark = pytest.mark.gpu

SHAPES = [
    (13, 96, 32),
    (40, 320, 64),
    (70, 576, 64),
    (24, 640, 128),
    (1, 128, 128),
    (3000, 1536, 128),
    (200, 4096, 128),
]
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LARGEST_ERROR = 2e-4  # of a row's norm: fixed point activations, and float32 sums


@pytest.fixture(scope="module")
def warpgroups():
    if not has_warpgroups(torch.device("cuda", 0)):
        pytest.skip("This GPU has no warpgroup products.")  # and so none of its products goes through them


def on_gpu(weight: NestedWeight) -> NestedWeight:
    return replace(
        weight,
        chunks={name: chunk.cuda() for name, chunk in weight.chunks.items()},
        affine={width: Affine(part.scale.cuda(), part.zero.cuda()) for width, part in weight.affine.items()},
    )


def assert_near_oracle(y, x, weight, width, bias=None):
    expected = reference.linear(x.float().cpu(), weight, width)
    if bias is not None:
        expected += bias
    error = (y.float().cpu() - expected).norm(dim=1)
    if weight.out_features > 1:
        size = expected.norm(dim=1)
    else:  # a single output may cancel to nothing
        size = x.float().cpu().norm(dim=1) * reference.dequantize(weight, width).norm()
    assert (error <= (LARGEST_ERROR + ROUNDING[y.dtype]) * size).all()


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_is_near_the_oracle(shape, width, tokens, dtype):
    weight, x, bias = random_nested(*shape), normal(tokens, shape[1]).to(dtype), normal(shape[0])
    served = dispatch.prepare(on_gpu(weight))
    assert isinstance(served, fragments.FragmentWeight)
    y = dispatch.linear(x.cuda(), served, [(width, 0, tokens)], bias.cuda())
    assert y.dtype == dtype
    assert_near_oracle(y, x, weight, width, bias)


@pytest.mark.parametrize("float_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-12, 1e6])
def test_the_error_is_relative_to_the_input(float_dtype, magnitude):
    weight, x = random_nested(40, 128, 64, float_dtype=float_dtype), normal(6, 128) * magnitude
    assert_near_oracle(dispatch.linear(x.cuda(), fragments.pack(on_gpu(weight)), [(8, 0, 6)]), x, weight, 8)


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
def test_no_stream_below_the_width_is_read(width):
    weight, x = random_nested(24, 128, 64), normal(3, 128).cuda()
    expected = dispatch.linear(x, fragments.pack(on_gpu(weight)), [(width, 0, 3)])
    for other in (with_noise_below(weight, width), without_below(weight, width)):
        assert torch.equal(dispatch.linear(x, fragments.pack(on_gpu(other)), [(width, 0, 3)]), expected)


@pytest.mark.parametrize("shape", [(70, 576, 64), (3000, 1536, 128), (200, 4096, 128), (9000, 512, 32)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_at_any_place_and_width_beside_it(shape):
    served = fragments.pack(on_gpu(random_nested(*shape)))
    x = normal(300, shape[1]).cuda().to(torch.bfloat16)
    alone = {
        width: torch.cat([dispatch.linear(x[row : row + 1], served, [(width, 0, 1)]) for row in range(24)])
        for width in layout.BIT_WIDTHS
    }
    for width, expected in alone.items():
        for tokens in (2, 5, 8, 9, 16, 24, 150, 300):
            y = dispatch.linear(x[:tokens], served, [(width, 0, tokens)])
            assert torch.equal(y[:24], expected[:tokens])
    mixed = dispatch.linear(x[:24], served, [(2, 0, 7), (4, 7, 12), (8, 12, 24)])
    assert torch.equal(mixed, torch.cat((alone[2][:7], alone[4][7:12], alone[8][12:])))


@pytest.mark.parametrize("width", [2, 8])
@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_every_tiling_gives_the_same_bits(width, tokens):
    weight = random_nested(500, 2048, 128)
    served, x = fragments.pack(on_gpu(weight)), normal(tokens, 2048).cuda()
    activations = prepare_activations(x, InputForm(128))
    base = default_tiling(500, 2048, width, activations.passes)
    others = [(2, 1, 16, 1, 1), (1, 2, 4, 1, 2), (1, 3, 1, 1, 1), (1, 2, 4, 4, 1), (2, 1, 2, 8, 1)]
    results = []
    for tiling in [base, *(Tiling(*fields, base.segments) for fields in others)]:
        y = torch.full((tokens, 500), torch.nan, device="cuda")
        cuda.multiply_few(activations, served, width, None, y, tiling)
        results.append(y)
    assert all(torch.equal(result, results[0]) for result in results)
    assert_near_oracle(results[0], x, weight, width)


@pytest.mark.usefixtures("warpgroups")
@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("shape", [(500, 2048, 128), (70, 576, 64), (9000, 512, 32), (200, 4096, 64)], ids=str)
def test_products_of_warpgroups_have_the_bits_of_few_rows(shape, width):
    rows, columns, group_size = shape
    served, bias = fragments.pack(on_gpu(random_nested(*shape))), normal(rows, seed=3).cuda()
    segments = num_segments(rows, columns)
    for tokens in (3, 17, 64, 100):
        x = normal(tokens, columns).cuda().to(torch.bfloat16)
        expected = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
        cuda.multiply(prepare_activations(x, InputForm(group_size)), served, width, bias, expected)
        activations = prepare_activations(x, InputForm(group_size, pass_tiles=8 if tokens <= 32 else 16))
        for fields in [None, (2, 1, 4), (1, 1, 3), (2, min(segments, 4), 2), (1, min(segments, 8), 2)]:
            tiling = None if fields is None else BatchTiling(*fields, segments)
            y = torch.full_like(expected, torch.nan)
            multiply_batch(activations, served, width, bias, y, tiling)
            assert torch.equal(y, expected), (tokens, fields)


@pytest.mark.usefixtures("warpgroups")
@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(500, 2048, 128), (70, 576, 64), (9000, 512, 32), (200, 4096, 64)], ids=str)
def test_products_of_values_are_near_the_oracle(shape, dtype, width):
    """Within what rounding the weight, and at 6 and 8 bits a sum before it, to the values' type leaves."""
    rows, columns, group_size = shape
    weight, bias = random_nested(*shape), normal(rows, seed=3)
    served = fragments.pack(on_gpu(weight))
    levels = reference.dequantize(weight, width)
    for tokens in (1, 9, 17, 33, 100, 200):
        x = normal(tokens, columns).to(dtype)
        expected = x.double() @ levels.double().T + bias.double()
        allowed = 3 * torch.finfo(dtype).eps * (x.double().abs() @ levels.double().abs().T + expected.abs())
        form = InputForm(group_size, cuda.values_tiles(tokens), is_values=True)
        activations = prepare_activations(x.cuda(), form)
        for fields in [None, (2, 3), (3, 2), (4, 2)]:
            y = torch.full((tokens, rows), torch.nan, dtype=dtype, device="cuda")
            tiling = None if fields is None else ValuesTiling(*fields)
            multiply_values(activations, served, width, bias.cuda(), y, tiling)
            assert bool(((y.cpu().double() - expected).abs() <= allowed).all()), (tokens, fields)


@pytest.mark.parametrize("tokens", [1, 17, 40, 100, 200, 300])
def test_fast_products_of_any_number_of_tokens_are_near_the_exact_ones(tokens):
    served = fragments.pack(on_gpu(random_nested(700, 1024, 128)))
    x = normal(tokens, 1024).cuda().to(torch.bfloat16)
    exact = dispatch.linear(x, served, [(4, 0, tokens)]).float()
    form = cuda.fast_form(tokens, served)
    fast = torch.empty(tokens, 700, dtype=torch.bfloat16, device="cuda")
    if form is None:
        torch.mm(x, cuda.dequantize(served, 4).T, out=fast)
    else:
        cuda.multiply(prepare_activations(x, form), served, 4, None, fast)
    assert float((fast.float() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_say_so_and_harm_no_other(bad):
    served, x = fragments.pack(on_gpu(random_nested(40, 320, 64))), normal(6, 320).cuda()
    expected = dispatch.linear(x, served, [(4, 0, 6)])
    x[2, 100] = bad
    y = dispatch.linear(x, served, [(4, 0, 6)])
    assert not torch.isfinite(y[2]).any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize("shape", [(70, 576, 64), (24, 640, 128)], ids=str)
def test_embedding_rows_are_the_tables(shape, width):
    weight, ids = random_nested(*shape), torch.tensor([0, 3, 23, 3, 17, 9])
    rows = dispatch.embedding(ids.cuda(), fragments.pack(on_gpu(weight)), width)
    assert torch.allclose(rows.cpu(), reference.dequantize(weight, width)[ids], rtol=1e-5, atol=1e-5)


def test_a_product_can_be_captured_and_replayed():
    weight = random_nested(300, 1024, 128)
    served, x = fragments.pack(on_gpu(weight)), normal(5, 1024).cuda()
    dispatch.linear(x, served, [(3, 0, 5)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.linear(x, served, [(3, 0, 5)])
    x.copy_(normal(5, 1024, seed=1))
    graph.replay()
    assert_near_oracle(y, x, weight, 3)


@pytest.mark.parametrize("widths", [(2, 4, 8), (2, 3), (3, 6), (4, 6, 8), layout.BIT_WIDTHS])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(70, 576, 64), (3000, 1536, 128), (40, 320, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_several_widths_in_one_launch_are_what_they_are_alone(widths, rows, columns, group_size, dtype):
    weight = fragments.pack(on_gpu(random_nested(rows, columns, group_size)))
    bias = normal(rows, seed=5).cuda()
    for tiles in (2, 4, 8, 11, 20):
        x = normal(4 * tiles, columns, seed=tiles).cuda().to(dtype)
        of_tiles = torch.tensor(widths)[torch.randint(len(widths), (num_token_tiles(4 * tiles),))]
        if tiles > 4:
            of_tiles = of_tiles[::4].repeat_interleave(4)
        of_rows = of_tiles.repeat_interleave(4).cuda()
        y = torch.empty(4 * tiles, rows, dtype=dtype, device="cuda")
        inputs = prepare_activations(x, InputForm(group_size))
        cuda.multiply_mixed(inputs, weight, cuda.RowWidths(tuple(widths), of_rows), bias, y)
        for tile in range(tiles):
            part = slice(4 * tile, 4 * tile + 4)
            alone = cuda.linear(x[part], weight, [(int(of_tiles[tile]), 0, 4)], bias)
            assert torch.equal(y[part], alone)


@pytest.mark.usefixtures("warpgroups")
@pytest.mark.parametrize("widths", [(2, 4, 8), (3,), (2, 3), (3, 6), (4, 6, 8), layout.BIT_WIDTHS])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(70, 576, 64), (3000, 1536, 128), (40, 320, 32), (13, 96, 32), (9000, 1024, 128)],
)
def test_values_of_several_widths_are_near_the_oracle_and_do_not_depend_on_one_another(
    widths, rows, columns, group_size
):
    weight = random_nested(rows, columns, group_size)
    served, bias = fragments.pack(on_gpu(weight)), normal(rows, seed=5)

    def products(x, of_rows, present=widths):
        y = torch.empty(len(x), rows, dtype=x.dtype, device="cuda")
        mixed = cuda.RowWidths(tuple(present), of_rows.cuda())
        form = cuda.mixed_form(len(x), served, mixed, is_fast=True)
        assert form.is_values
        cuda.multiply_mixed(prepare_activations(x.cuda(), form), served, mixed, bias.cuda(), y)
        return y

    for tokens in (3, 16, 31, 48, 80, 130):
        x = (normal(tokens, columns, seed=tokens) + 0.5).bfloat16()
        of_rows = torch.tensor(widths)[torch.randint(len(widths), (tokens,))]
        y = products(x, of_rows)
        for width in set(of_rows.tolist()):
            assert_near_oracle(y[(of_rows == width).cuda()], x[of_rows == width], weight, width, bias)
        if tokens < 32:  # one pass, whatever widths there may be
            assert torch.equal(products(x, of_rows, layout.BIT_WIDTHS), y)
        # In the order of widths, some of the products are left out.
        in_order = of_rows.argsort(stable=True)
        assert torch.equal(products(x[in_order], of_rows[in_order]), y[in_order.cuda()])
        # Others get other values, widths and an infinity; the first row stays what it is.
        others, other_widths = normal(tokens, columns, seed=1).bfloat16(), of_rows.roll(1)
        others[0], other_widths[0] = x[0], of_rows[0]
        others[1, 0] = torch.inf
        assert torch.equal(products(others, other_widths)[0], y[0])


@pytest.mark.parametrize("width", layout.BIT_WIDTHS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_a_dequantized_weight_is_the_oracles_rounded(rows, columns, group_size, width):
    weight = random_nested(rows, columns, group_size)
    got = cuda.dequantize(fragments.pack(on_gpu(weight)), width).cpu().float()
    expected = reference.dequantize(weight, width)
    assert torch.allclose(got, expected, rtol=2**-8, atol=1e-3)
