"""How a product of few tokens is cut into blocks and warps, per device, shape, width and number of tokens."""

import functools
import importlib.resources
import json
import math
from dataclasses import dataclass

import torch

from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_ROWS

FEW_ROWS = 8192
_SIMILAR = 2.5  # factors of two between shapes, at most
_SUMS_BYTES = 64 * 4  # of one row tile times one n-tile
_SAME_CHIP = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}  # with other memory


@dataclass(frozen=True, slots=True)
class Tiling:
    """Constants of `source/linear_decode.cu`.

    `segments` decides the order of sums, so it must be the same for all widths and batches of a shape. `min_blocks` is how
    many a multiprocessor is to have registers for.
    """

    row_tiles: int
    row_warps: int
    column_warps: int
    cluster: int
    depth: int
    segments: int
    min_blocks: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.column_warps

    def shared_bytes(self, token_tiles: int) -> int:
        if self.segments == 1:
            return 0
        return self.row_warps * self.segments // self.cluster * self.row_tiles * token_tiles * _SUMS_BYTES


@functools.cache
def choose_tiling(out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling:
    """The best that was measured for this shape or for one like it, else one that keeps all multiprocessors busy."""
    found = nearest_tuned(torch.cuda.get_device_name(), out_features, in_features, bit_width, token_tiles)
    return found or default_tiling(out_features, in_features, bit_width, token_tiles)


def nearest_tuned(device: str, out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling | None:
    """The tiling of the nearest measured shape with the same segments, of a size within a factor; None if there is none."""
    segments, nearest, found = num_segments(out_features, in_features), _SIMILAR, None
    for key, fields in all_tuned().get(_SAME_CHIP.get(device, device), {}).items():
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
