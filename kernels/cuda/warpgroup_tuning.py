"""How a product of many tokens is cut into blocks of Hopper's warpgroups."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from anybit.kernels.cuda.driver import max_shared_bytes, num_multiprocessors
from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_ROWS, TILE_TOKENS
from anybit.kernels.cuda.tuning import num_segments
from anybit.kernels.layout import NIBBLE_BITS

_TILES_OF_WARPGROUP = 4
_CLUSTERS = (1, 2, 4, 8)
_BATCH_STAGES, _VALUES_STAGES = (5, 4, 3, 2), (4, 3, 2)
_WARPGROUPS = 2  # of `source/linear_batch.cu`
_VALUES_WARPGROUPS = (4, 2, 3)  # of `source/linear_values.cu`
_MIXED_WARPGROUPS, _MANY_SUMS = (
    (3, 2),
    24,
)  # the same for several widths; of many sums, only the last leaves registers for
_SHARING_COST = 14  # what adding up sums of pieces takes, in tiles of columns of a warpgroup
_LEAST_TILES = 2  # of columns, in a piece
_BLOCK_COST, _CLUSTER_COST = 4, 6  # what a block does besides its columns, in tiles of them


@dataclass(frozen=True, slots=True)
class RingOperands:
    """What passes through a block's ring (`source/ring.cuh`): codes and parts of widths, inputs in n-tiles of a pass."""

    widths: tuple[int, ...]
    group_size: int
    part_bytes: int
    pass_tiles: int
    has_sums: bool = False

    @property
    def bit_width(self) -> int:
        """The widest."""
        return max(self.widths)

    @property
    def groups(self) -> int:
        """Of a tile of columns."""
        return TILE_COLUMNS // self.group_size

    @property
    def pass_tokens(self) -> int:
        return self.pass_tiles * TILE_TOKENS

    @property
    def num_parts(self) -> int:
        """Widths of which scales and zeros are read."""
        return num_parts(self.widths)

    def stage_bytes(self, warpgroups: int) -> int:
        parts = self.num_parts * self.groups * TILE_ROWS * 2 * self.part_bytes
        weights = TILE_ROWS * TILE_COLUMNS * self.bit_width // 8 + parts
        sums = 4 * self.groups * self.pass_tokens if self.has_sums else 0
        return self.pass_tiles * 8 * TILE_COLUMNS + sums + warpgroups * _TILES_OF_WARPGROUP * weights


_BARRIERS_OF_STAGE = 16


class WarpgroupTiling(Protocol):
    """`warpgroups` of 64 rows a block, `stages` of the ring."""

    @property
    def warpgroups(self) -> int: ...

    @property
    def stages(self) -> int: ...

    def shared_bytes(self, operands: RingOperands) -> int: ...


_Tiling = TypeVar("_Tiling", bound=WarpgroupTiling)


@dataclass(frozen=True, slots=True)
class BatchTiling:
    """Constants of `source/linear_batch.cu`: `cluster` blocks share the columns, `segments` as of a `Tiling`."""

    warpgroups: int
    cluster: int
    stages: int
    segments: int

    def shared_bytes(self, operands: RingOperands) -> int:
        scales = operands.groups * operands.pass_tokens * 8
        places = 1 if self.cluster == 1 else self.segments // self.cluster
        sums = places * operands.pass_tokens * (64 * self.warpgroups + 8) * 4
        return self.stages * (operands.stage_bytes(self.warpgroups) + scales + _BARRIERS_OF_STAGE) + sums


@dataclass(frozen=True, slots=True)
class ValuesTiling:
    """Constants of `source/linear_values.cu`."""

    warpgroups: int
    stages: int

    def shared_bytes(self, operands: RingOperands) -> int:
        return self.stages * (operands.stage_bytes(self.warpgroups) + _BARRIERS_OF_STAGE)


@dataclass(frozen=True, slots=True)
class Division:
    """What each of `grid` blocks of threads multiplies: a piece of a cut block, then `rounds` whole ones.

    Blocks that are multiplied are 64 rows a warpgroup by the tokens of a pass; `cut_blocks` of them are in `splits` pieces.
    """

    grid: int
    rounds: int
    cut_blocks: int
    splits: int

    def partial_numbers(self, tiling: ValuesTiling, pass_tokens: int) -> int:
        """Sums of pieces that are added up in the end."""
        return self.cut_blocks * self.splits * 64 * tiling.warpgroups * pass_tokens if self.splits > 1 else 0


def num_threads(tiling: WarpgroupTiling) -> int:
    """Of a block; one warpgroup more fills the ring."""
    return 128 * (tiling.warpgroups + 1)


def num_blocks(out_features: int, tiling: WarpgroupTiling) -> int:
    """Of rows."""
    return -(-out_features // (TILE_ROWS * _TILES_OF_WARPGROUP * tiling.warpgroups))


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a device: multiprocessors, and bytes of shared memory that a block can have."""

    multiprocessors: int
    shared_bytes: int


def limits() -> Limits:
    """Those of the current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    return Limits(num_multiprocessors(device), max_shared_bytes(device))


@functools.cache
def default_batch_tiling(
    out_features: int, in_features: int, passes: int, operands: RingOperands, limits: Limits
) -> BatchTiling:
    """What ends soonest if every multiprocessor takes equally long for a tile of columns."""
    segments, column_tiles = num_segments(out_features, in_features), _column_tiles(in_features)

    def cost(tiling: BatchTiling) -> float:
        blocks = num_blocks(out_features, tiling) * tiling.cluster * passes
        other_work = _BLOCK_COST if tiling.cluster == 1 else _CLUSTER_COST
        return -(-blocks // limits.multiprocessors) * (column_tiles / tiling.cluster + other_work)

    candidates = [
        _most_stages(
            [BatchTiling(_WARPGROUPS, cluster, stages, segments) for stages in _BATCH_STAGES], operands, limits
        )
        for cluster in _CLUSTERS
        if segments % cluster == 0
    ]
    return min((tiling for tiling in candidates if tiling is not None), key=cost)


@functools.cache
def default_values_tiling(
    out_features: int, in_features: int, passes: int, operands: RingOperands, limits: Limits
) -> ValuesTiling:
    """What ends soonest if a multiprocessor takes as long for a tile of columns as it has warpgroups."""

    column_tiles = _column_tiles(in_features)

    def cost(tiling: ValuesTiling) -> float:
        division = divide(num_blocks(out_features, tiling) * passes, column_tiles, limits)
        tiles = division.rounds * column_tiles + (-(-column_tiles // division.splits) if division.cut_blocks else 0)
        other_work = _SHARING_COST + division.splits / 2 if division.splits > 1 else 0
        return tiles * tiling.warpgroups + other_work

    candidates = [
        _most_stages([ValuesTiling(warpgroups, stages) for stages in _VALUES_STAGES], operands, limits)
        for warpgroups in _values_warpgroups(operands)
    ]
    return min((tiling for tiling in candidates if tiling is not None), key=cost)


def num_parts(widths: tuple[int, ...]) -> int:
    """How many widths' scales and zeros products at these need: above 4 bits, those of 4 too."""
    return len({*widths, min(max(widths), NIBBLE_BITS)})


def _values_warpgroups(operands: RingOperands) -> tuple[int, ...]:
    if not operands.has_sums:
        return _VALUES_WARPGROUPS
    return _MIXED_WARPGROUPS if operands.num_parts * operands.pass_tiles <= _MANY_SUMS else _MIXED_WARPGROUPS[1:]


def divide(blocks: int, column_tiles: int, limits: Limits) -> Division:
    """Blocks among multiprocessors, so that each has about as many tiles of columns."""
    rounds, cut_blocks = divmod(blocks, limits.multiprocessors)
    if cut_blocks == 0:
        return Division(limits.multiprocessors, rounds, 0, 1)
    splits = max(1, min(limits.multiprocessors // cut_blocks, column_tiles // _LEAST_TILES))
    return Division(limits.multiprocessors if rounds else cut_blocks * splits, rounds, cut_blocks, splits)


def _column_tiles(in_features: int) -> int:
    return -(-in_features // TILE_COLUMNS)


def _most_stages(tilings: Sequence[_Tiling], operands: RingOperands, limits: Limits) -> _Tiling | None:
    """The first that has the shared memory it needs."""
    return next((tiling for tiling in tilings if tiling.shared_bytes(operands) <= limits.shared_bytes), None)
