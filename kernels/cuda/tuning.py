"""How a product is cut into blocks and warps, per device, shape, width and number of tokens."""

import functools
import importlib.resources
import json
import math
from dataclasses import dataclass

import torch

from anybit.kernels.cuda.driver import max_shared_bytes, num_multiprocessors
from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_ROWS, TILE_TOKENS
from anybit.kernels.layout import NIBBLE_BITS

FEW_ROWS = 8192
_SIMILAR = 2.5  # factors of two between shapes, at most
_SUMS_BYTES = 64 * 4  # of one row tile times one n-tile
_WARPGROUPS = 2
_STAGES = (5, 4, 3, 2)
_BLOCK_COST, _CLUSTER_COST = 4, 6  # what a block does besides its columns, in tiles of them


@dataclass(frozen=True, slots=True)
class Tiling:
    """Constants of `source/linear_decode.cu`.

    `segments` decides the order of sums, so it must be the same for all widths and batches of a shape.
    """

    row_tiles: int
    row_warps: int
    column_warps: int
    cluster: int
    depth: int
    segments: int

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps

    def shared_bytes(self, token_tiles: int) -> int:
        if self.segments == 1:
            return 0
        return self.row_warps * self.segments // self.cluster * self.row_tiles * token_tiles * _SUMS_BYTES


@dataclass(frozen=True, slots=True)
class BatchOperands:
    """What a block of `source/linear_batch.cu` multiplies: codes and parts of a width, and n-tiles of a pass."""

    bit_width: int
    group_size: int
    part_bytes: int
    pass_tiles: int


@dataclass(frozen=True, slots=True)
class BatchTiling:
    """Constants of `source/linear_batch.cu`; `segments` as of a `Tiling`."""

    warpgroups: int
    cluster: int
    stages: int
    segments: int

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def row_tiles(self) -> int:
        return 4 * self.warpgroups

    def shared_bytes(self, operands: BatchOperands) -> int:
        pass_tokens = operands.pass_tiles * TILE_TOKENS
        groups = TILE_COLUMNS // operands.group_size
        parts = (1 if operands.bit_width <= NIBBLE_BITS else 2) * groups * TILE_ROWS * 2 * operands.part_bytes
        tiles = self.row_tiles * (TILE_ROWS * TILE_COLUMNS * operands.bit_width // 8 + parts)
        stage = operands.pass_tiles * 8 * TILE_COLUMNS + groups * pass_tokens * 8
        places = 1 if self.cluster == 1 else self.segments // self.cluster
        sums = places * pass_tokens * (64 * self.warpgroups + 8) * 4
        return self.stages * (stage + tiles + 16) + sums


def choose_batch_tiling(out_features: int, in_features: int, passes: int, operands: BatchOperands) -> BatchTiling:
    """The tiling for the current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    limits = num_multiprocessors(device), max_shared_bytes(device)
    return default_batch_tiling(out_features, in_features, passes, operands, *limits)


@functools.cache
def default_batch_tiling(
    out_features: int,
    in_features: int,
    passes: int,
    operands: BatchOperands,
    multiprocessors: int,
    shared_bytes: int,
) -> BatchTiling:
    """What ends soonest if every multiprocessor takes equally long for a tile of columns."""
    segments = num_segments(out_features, in_features)
    column_tiles = -(-in_features // TILE_COLUMNS)
    fewest, best = math.inf, None
    for cluster in (1, 2, 4, 8):
        if segments % cluster:
            continue
        tilings = [BatchTiling(_WARPGROUPS, cluster, stages, segments) for stages in _STAGES]
        fitting = [tiling for tiling in tilings if tiling.shared_bytes(operands) <= shared_bytes]
        if not fitting:
            continue
        blocks = -(-out_features // (TILE_ROWS * fitting[0].row_tiles)) * cluster * passes
        other_work = _BLOCK_COST if cluster == 1 else _CLUSTER_COST
        time = -(-blocks // multiprocessors) * (column_tiles / cluster + other_work)
        if time < fewest:
            fewest, best = time, fitting[0]
    if best is None:
        raise ValueError("No block has that much shared memory.")
    return best


@functools.cache
def choose_tiling(out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling:
    """The best that was measured for this shape or for one like it, else one that keeps all multiprocessors busy."""
    found = nearest_tuned(torch.cuda.get_device_name(), out_features, in_features, bit_width, token_tiles)
    return found or default_tiling(out_features, in_features, bit_width, token_tiles)


def nearest_tuned(device: str, out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling | None:
    """The tiling of the nearest measured shape with the same segments, of a size within a factor; None if there is none."""
    segments, nearest, found = num_segments(out_features, in_features), _SIMILAR, None
    for key, fields in all_tuned().get(device, {}).items():
        shape, width, tiles = key.split("/")
        rows, columns = map(int, shape.split("x"))
        if (int(width), int(tiles)) != (bit_width, token_tiles) or num_segments(rows, columns) != segments:
            continue
        distance = abs(math.log2(rows / out_features)) + abs(math.log2(columns / in_features))
        if distance < nearest:
            nearest, found = distance, Tiling(**fields, segments=segments)
    return found


def default_tiling(out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling:
    """A tiling for any shape: more warps per row the fewer rows there are."""
    segments = num_segments(out_features, in_features)
    column_warps = min(segments, 8)
    row_warps = max(1, min(16 // column_warps, -(-out_features // TILE_ROWS) // 128))
    return Tiling(1, row_warps, column_warps, 1, 1 if bit_width > 4 or token_tiles > 2 else 2, segments)


def num_segments(out_features: int, in_features: int) -> int:
    """Into how many segments the columns of a shape are cut, whatever the width and the batch."""
    wanted = 16 if out_features <= FEW_ROWS else 4
    while wanted * TILE_COLUMNS > in_features + TILE_COLUMNS - 1:
        wanted //= 2
    return wanted


@functools.cache
def all_tuned() -> dict[str, dict[str, dict[str, int]]]:
    """Device name -> "OUTxIN/width/n-tiles" -> fields of a Tiling; tests/bench/tune_cuda.py measures them."""
    file = importlib.resources.files("anybit.kernels.cuda") / "tuned.json"
    table: dict[str, dict[str, dict[str, int]]] = json.loads(file.read_text(encoding="utf-8"))
    return table
