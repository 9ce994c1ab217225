"""What is served against what the checkpoint says: passed by what is sound, failed by one bit."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.errors import KernelError
from anybit.engine.models.registry import read_config
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.run import quantize
from anybit.engine.weights import selfcheck
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.engine.weights.selfcheck import NUM_TILES, check_checkpoint, check_loaded
from anybit.engine.weights.tiles import Budget, WeightShape, draw_tiles
from anybit.kernels import layout
from anybit.kernels.cpu.packed import PackedWeight
from tests.fixtures.native import native_only
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import save_llama, tiny_llama

WIDTHS = layout.BIT_WIDTHS
ORDERS = [pytest.param(True, marks=native_only, id="native"), pytest.param(False, id="portable")]


def load(directory, native=True, bit_widths=WIDTHS, lm_head_bits=8):
    """A reader and the weights of its checkpoint as a decoder of Llama's shape would load them."""
    reader = CheckpointReader(directory)
    loader = NestedLoader(reader, bit_widths, lm_head_bits, native=native)
    loader.vocabulary("model.embed_tokens")
    for layer in range(read_config(directory).num_layers):
        prefix = f"model.layers.{layer}"
        loader.linear([f"{prefix}.self_attn.{name}_proj" for name in "qkv"], False)
        loader.linear([f"{prefix}.self_attn.o_proj"], False)
        loader.linear([f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"], False)
        loader.linear([f"{prefix}.mlp.down_proj"], False)
    loader.vocabulary("lm_head")
    return reader, loader.loaded


def streams(weight):
    """The code streams and the scales and zeros of a loaded weight, in the order of widths."""
    if isinstance(weight, PackedWeight):
        codes = [tensor for tensor in weight.tensors if tensor.dtype == torch.uint8]
        parts = [tensor for tensor in weight.tensors if tensor.dtype != torch.uint8]
        return codes, dict(zip(weight.bit_widths, zip(parts[::2], parts[1::2], strict=True), strict=True))
    return list(weight.chunks.values()), {width: (part.scale, part.zero) for width, part in weight.affine.items()}


@pytest.mark.parametrize("native", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_sound_weights_pass(tiny_checkpoint, native, seed):
    reader, loaded = load(tiny_checkpoint, native)
    report = check_loaded(reader, loaded, seed=seed)
    assert (report.bit_widths, report.weights) == (WIDTHS, len(loaded))
    # All there are: of q, k and v, of o, of gate and up, of down with its three groups; and of the tables at 8 bits.
    assert report.tiles == 2 * 5 * (16 + 8 + 24 + 24) + 2 * 64 <= NUM_TILES
    assert 0 < report.worst_error < 1 / 8127
    assert f"{report.tiles} random tiles of {len(loaded)} weights at 2, 3, 4, 6, 8 bits" in str(report)


@pytest.mark.parametrize("native", ORDERS)
@pytest.mark.parametrize(("bit_widths", "lm_head_bits"), [((2,), 8), ((3, 6), 4), ((4,), 2)])
def test_only_loaded_widths_are_checked(tiny_checkpoint, native, bit_widths, lm_head_bits):
    reader, loaded = load(tiny_checkpoint, native, bit_widths, lm_head_bits)
    assert check_loaded(reader, loaded).bit_widths == tuple(sorted({*bit_widths, lm_head_bits}))


def test_rows_that_fill_no_block_pass(tmp_path):
    source = save_llama(tiny_llama(vocab_size=509), tmp_path / "source")
    (tmp_path / "checkpoint").mkdir()
    quantize(HuggingFaceSource(source), tmp_path / "checkpoint", QuantizeOptions())
    for native in (True, False):
        assert check_loaded(*load(tmp_path / "checkpoint", native)).weights == 10


@pytest.mark.parametrize("native", ORDERS)
@pytest.mark.parametrize("number", [0, 1, 4, 9])
@pytest.mark.parametrize("stream", range(5))
def test_a_flipped_bit_is_found(tiny_checkpoint, native, number, stream):
    """In the first code of the stream: the streams of few bits are read at all widths above them, the last one at 8."""
    reader, loaded = load(tiny_checkpoint, native)
    codes, _ = streams(loaded[number].weight)
    codes[stream].view(-1)[0] ^= 1
    with pytest.raises(KernelError) as caught:
        check_loaded(reader, loaded, seed=0)
    if loaded[number].bit_widths == WIDTHS:
        assert_one_sentence(caught.value, f"at {WIDTHS[stream]} bits", loaded[number].names[0])
    assert_one_sentence(caught.value, "rows from ", "inputs from ", "ANYBIT_CPU_KERNELS=none")


@pytest.mark.parametrize("native", ORDERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["scale", "zero"])
@pytest.mark.parametrize("wrong", [1.1, math.nan, math.inf])
def test_a_wrong_float_part_is_found(tiny_checkpoint, native, width, which, wrong):
    reader, loaded = load(tiny_checkpoint, native)
    _, parts = streams(loaded[4].weight)
    part = parts[width][which == "zero"].view(-1)
    part[0] = part[0] * wrong
    with pytest.raises(KernelError) as caught:
        check_loaded(reader, loaded, seed=0)
    assert_one_sentence(caught.value, loaded[4].names[0], f"at {width} bits")


def test_the_error_names_the_weight_inside_a_stack(tiny_checkpoint):
    """The value projection is the last of three: rows 96 to 127 of the stack."""
    reader, loaded = load(tiny_checkpoint, native=False)
    loaded[1].weight.affine[3].scale[0, 104:112] *= 2
    with pytest.raises(KernelError, match=r"self_attn\.v_proj\.weight \(rows from 8, inputs from 0\) at 3 bits"):
        check_loaded(reader, loaded)


def test_weights_of_another_checkpoint_are_found(tiny_checkpoint, tmp_path):
    source = save_llama(tiny_llama(seed=1), tmp_path / "source")
    (tmp_path / "checkpoint").mkdir()
    quantize(HuggingFaceSource(source), tmp_path / "checkpoint", QuantizeOptions())
    with pytest.raises(KernelError):
        check_loaded(load(tiny_checkpoint)[0], load(tmp_path / "checkpoint")[1])


def test_a_finished_checkpoint_is_checked_at_all_its_widths(tiny_checkpoint):
    report = check_checkpoint(tiny_checkpoint, "cpu")
    assert (report.bit_widths, report.weights) == (WIDTHS, 2 + 2 * 7)
    assert report.tiles <= NUM_TILES


def test_without_a_seed_other_tiles_are_drawn_each_time(tiny_checkpoint):
    reader, loaded = load(tiny_checkpoint)
    first, second = check_loaded(reader, loaded), check_loaded(reader, loaded)
    assert first.seed != second.seed
    again = check_loaded(reader, loaded, seed=first.seed)
    assert (again.worst_error, again.seed) == (first.worst_error, first.seed)


def test_the_portable_kernels_have_their_own_budget(tiny_checkpoint, monkeypatch):
    budgets = []

    def drawn(shapes, count, budget, seed):
        budgets.append(budget.products)
        return draw_tiles(shapes, count, budget, seed)

    monkeypatch.setattr(selfcheck, "draw_tiles", drawn)
    for native in (True, False):
        monkeypatch.setattr(selfcheck, "is_native", lambda native=native: native)
        check_checkpoint(tiny_checkpoint)
    assert budgets[0] > budgets[1]


def test_an_engine_is_checked_when_it_loads(tiny_checkpoint, caplog):
    config = EngineConfig(
        checkpoint=str(tiny_checkpoint), model_name="tiny", bit_widths=(2, 4), device="cpu", max_num_seqs=1, threads=1
    )
    with caplog.at_level(logging.INFO, "anybit.engine"):
        assemble(config)
    (line,) = (record.message for record in caplog.records if "Self-check" in record.message)
    assert "at 2, 4, 8 bits agree with the checkpoint" in line


SHAPES = st.lists(
    st.builds(
        lambda out, groups, group_size, widths: WeightShape(
            out, groups * group_size, group_size, tuple(sorted(widths))
        ),
        st.integers(1, 4000),
        st.integers(1, 40),
        st.sampled_from(layout.GROUP_SIZES),
        st.sets(st.sampled_from(WIDTHS), min_size=1),
    ),
    min_size=1,
    max_size=12,
)


@given(SHAPES, st.integers(1, 300), st.integers(1, 10**8), st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32))
def test_tiles_are_different_exist_and_follow_from_the_seed(shapes, count, products, layers, groups, seed):
    budget = Budget(products, layers, groups)
    tiles = draw_tiles(shapes, count, budget, seed)
    assert tiles == sorted(set(tiles)) == draw_tiles(shapes, count, budget, seed)
    assert 1 <= len(tiles) <= count
    for tile in tiles:
        shape = shapes[tile.weight]
        assert tile.bit_width in shape.bit_widths
        assert 0 <= tile.group < shape.num_groups
        assert 0 <= tile.block < shape.num_blocks
    widths = {width for shape in shapes for width in shape.bit_widths}
    if count >= len(widths) * 8 * len(shapes):
        assert {tile.bit_width for tile in tiles} == widths
    rows = {(tile.weight, tile.bit_width, tile.group) for tile in tiles}
    most = max(shape.size for shape in shapes)
    assert sum(shapes[weight].size for weight, _, _ in rows) <= max(products, len(widths) * most)
    assert len(rows) <= groups * len({(tile.weight, tile.bit_width) for tile in tiles})
    assert len({(tile.weight, tile.bit_width) for tile in tiles}) <= max(layers, len(widths))


@given(SHAPES, st.integers(0, 2**32))
def test_all_tiles_are_drawn_where_they_are_few(shapes, seed):
    small = [WeightShape(min(shape.out_features, 40), 64, 32, shape.bit_widths) for shape in shapes[:4]]
    everything = sum(2 * shape.num_blocks * len(shape.bit_widths) for shape in small)
    assert len(draw_tiles(small, 1000, Budget(10**9, 128, 2), seed)) == everything


def test_tiles_of_a_large_model_come_from_some_weights_and_all_widths():
    layer = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    shapes = [WeightShape(out, size, 128, WIDTHS) for _ in range(32) for out, size in layer]
    shapes.append(WeightShape(128256, 4096, 128, (8,)))
    tiles = draw_tiles(shapes, NUM_TILES, Budget(800_000_000, 64, 4), seed=0)
    assert len(tiles) == NUM_TILES
    assert {tile.bit_width for tile in tiles} == set(WIDTHS)
    assert len({tile.weight for tile in tiles}) > 8
    assert tiles != draw_tiles(shapes, NUM_TILES, Budget(800_000_000, 64, 4), seed=1)
