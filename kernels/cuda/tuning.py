"""How a product is cut into blocks and warps, per device, shape, width and number of tokens."""

import functools
import importlib.resources
import json
from dataclasses import dataclass

import torch

from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_ROWS

_FEW_ROWS = 8192
_SUMS_BYTES = 64 * 4  # of one row tile times one n-tile


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


@functools.cache
def choose_tiling(out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling:
    """The measured best, else one that keeps all multiprocessors busy."""
    key = f"{out_features}x{in_features}/{bit_width}/{token_tiles}"
    found = all_tuned().get(torch.cuda.get_device_name(), {}).get(key)
    if found is None:
        return default_tiling(out_features, in_features, bit_width, token_tiles)
    return Tiling(**found, segments=num_segments(out_features, in_features))


def default_tiling(out_features: int, in_features: int, bit_width: int, token_tiles: int) -> Tiling:
    """A tiling for any shape: more warps per row the fewer rows there are."""
    segments = num_segments(out_features, in_features)
    column_warps = min(segments, 8)
    row_warps = max(1, min(16 // column_warps, -(-out_features // TILE_ROWS) // 128))
    return Tiling(1, row_warps, column_warps, 1, 1 if bit_width > 4 or token_tiles > 2 else 2, segments)


def num_segments(out_features: int, in_features: int) -> int:
    """Into how many segments the columns of a shape are cut, whatever the width and the batch."""
    wanted = 16 if out_features <= _FEW_ROWS else 4
    while wanted * TILE_COLUMNS > in_features + TILE_COLUMNS - 1:
        wanted //= 2
    return wanted


@functools.cache
def all_tuned() -> dict[str, dict[str, dict[str, int]]]:
    """Device name -> "OUTxIN/width/n-tiles" -> fields of a Tiling; tests/bench/tune_cuda.py measures them."""
    file = importlib.resources.files("anybit.kernels.cuda") / "tuned.json"
    table: dict[str, dict[str, dict[str, int]]] = json.loads(file.read_text(encoding="utf-8"))
    return table
