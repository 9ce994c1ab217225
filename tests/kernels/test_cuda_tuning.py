"""Tilings of the GPU's products can be launched, whatever the shape; no GPU is needed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anybit.kernels import layout
from anybit.kernels.cuda import linear
from anybit.kernels.cuda.tuning import Tiling, all_tuned, default_tiling, nearest_tuned, num_segments
from anybit.kernels.cuda.warpgroup_tuning import (
    Limits,
    RingOperands,
    default_batch_tiling,
    default_values_tiling,
    divide,
    num_threads,
)

TOKEN_TILES = (1, 2, 4, 8)
MAX_SHARED_BYTES = 160 << 10  # of a block on compute capability 8.0, less what the system takes
HOPPER = Limits(multiprocessors=132, shared_bytes=227 << 10)


def assert_launchable(tiling: Tiling, in_features: int, token_tiles: int) -> None:
    assert tiling.segments % (tiling.column_warps * tiling.cluster) == 0
    assert tiling.segments == 1 or tiling.segments * 128 <= in_features + 127  # none is empty
    assert 32 <= tiling.threads <= 1024
    assert tiling.shared_bytes(token_tiles) <= MAX_SHARED_BYTES


@given(
    st.integers(1, 200_000), st.integers(1, 1000).map(lambda groups: 32 * groups), st.sampled_from(layout.BIT_WIDTHS)
)
def test_any_shape_has_one(out_features, in_features, bit_width):
    for token_tiles in TOKEN_TILES:
        assert_launchable(default_tiling(out_features, in_features, bit_width, token_tiles), in_features, token_tiles)


def test_chips_with_other_memory_take_what_was_tuned():
    shape = (28672, 4096, 4, 1)
    assert nearest_tuned("NVIDIA H200", *shape) == nearest_tuned("NVIDIA H100 80GB HBM3", *shape) is not None


@pytest.mark.parametrize("device", all_tuned())
def test_tuned_ones_keep_the_order_of_sums(device):
    for key, fields in all_tuned()[device].items():
        shape, bit_width, token_tiles = key.split("/")
        out_features, in_features = map(int, shape.split("x"))
        tiling = Tiling(**fields, segments=num_segments(out_features, in_features))
        assert_launchable(tiling, in_features, int(token_tiles))
        assert int(bit_width) in layout.BIT_WIDTHS
        assert int(token_tiles) in TOKEN_TILES


@pytest.mark.parametrize("device", all_tuned())
def test_a_shape_is_cut_like_the_nearest_measured_one(device):
    measured = all_tuned()[device]["4096x4096/4/1"]
    for out_features, in_features in [(4096, 4096), (4064, 4096), (3072, 3072)]:
        found = nearest_tuned(device, out_features, in_features, 4, 1)
        assert found == Tiling(**measured, segments=num_segments(out_features, in_features))
    assert nearest_tuned(device, 128, 128, 4, 1) is None
    assert nearest_tuned("another device", 4096, 4096, 4, 1) is None


@given(st.integers(1, 200_000), st.integers(1, 300).map(lambda groups: 128 * groups))
def test_borrowed_tilings_can_be_launched(out_features, in_features):
    for device in all_tuned():
        for token_tiles in TOKEN_TILES:
            found = nearest_tuned(device, out_features, in_features, 4, token_tiles)
            if found is not None:
                assert_launchable(found, in_features, token_tiles)


many_tokens = given(
    st.integers(1, 200_000),
    st.integers(1, 600).map(lambda tiles: 32 * tiles),
    st.integers(1, 40),
    st.sampled_from(layout.BIT_WIDTHS),
    st.sampled_from((32, 64, 128)),
    st.sampled_from((2, 4)),
    st.sampled_from((8, 16)),
)


@many_tokens
def test_a_block_of_warpgroups_fits_and_takes_whole_segments(
    out_features, in_features, passes, width, group_size, part_bytes, pass_tiles
):
    operands = RingOperands((width,), group_size, part_bytes, pass_tiles)
    tiling = default_batch_tiling(out_features, in_features, passes, operands, HOPPER)
    assert tiling.shared_bytes(operands) <= HOPPER.shared_bytes
    assert tiling.segments == num_segments(out_features, in_features)
    assert tiling.segments % tiling.cluster == 0


@many_tokens
def test_a_block_of_values_fits_and_has_columns(
    out_features, in_features, passes, width, group_size, part_bytes, pass_tiles
):
    values_tiles = 2 if pass_tiles == 8 else 32
    operands = RingOperands((width,), group_size, part_bytes, values_tiles)
    tiling = default_values_tiling(out_features, in_features, passes, operands, HOPPER)
    assert tiling.shared_bytes(operands) <= HOPPER.shared_bytes
    assert num_threads(tiling) <= 640


@many_tokens
def test_a_block_of_values_of_several_widths_fits(
    out_features, in_features, passes, width, group_size, part_bytes, pass_tiles
):
    operands = RingOperands(tuple(layout.BIT_WIDTHS), group_size, part_bytes, pass_tiles, has_sums=True)
    tiling = default_values_tiling(out_features, in_features, passes, operands, HOPPER)
    assert tiling.shared_bytes(operands) <= HOPPER.shared_bytes
    assert tiling.warpgroups == 2  # three would have too few registers for five widths


@pytest.mark.parametrize(("is_fast", "is_hopper"), [(False, False), (True, False), (False, True), (True, True)])
def test_rows_of_a_width_begin_where_its_passes_do(monkeypatch, is_fast, is_hopper):
    monkeypatch.setattr(linear, "has_warpgroups", lambda device: is_hopper)
    counts = [(5, 1), (4, 4, 8), (4, 4, 9), (1,) * 5, (11, 11, 10)]
    aligned = [linear.mixed_alignment(of_widths, torch.device("cuda"), is_fast) for of_widths in counts]
    assert aligned == ([1] * 5 if is_fast and is_hopper else [4, 4, 16, 16, 16])


def test_clusters_are_for_weights_with_too_few_rows_to_go_round():
    operands = RingOperands((4,), 128, 2, 16)
    clusters = {
        (rows, passes): default_batch_tiling(rows, 4096, passes, operands, HOPPER).cluster
        for rows, passes in [(28672, 1), (4096, 1), (4096, 32)]
    }
    assert clusters[28672, 1] == clusters[4096, 32] == 1
    assert clusters[4096, 1] > 1


@given(st.integers(1, 5000), st.integers(1, 600))
def test_every_block_of_values_is_multiplied_once(blocks, column_tiles):
    division = divide(blocks, column_tiles, HOPPER)
    assert division.rounds * division.grid + division.cut_blocks == blocks
    assert division.cut_blocks * division.splits <= division.grid <= HOPPER.multiprocessors
    assert 1 <= division.splits <= column_tiles
    assert division.rounds == 0 or division.grid == HOPPER.multiprocessors
