"""How a product of many tokens is cut into blocks of Hopper's warpgroups."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from anybit.kernels.cuda.driver import max_shared_bytes, num_multiprocessors
from anybit.kernels.cuda.fragments import TILE_COLUMNS, TILE_ROWS, TILE_TOKENS
from anybit.kernels.cuda.tuning import num_segments
from anybit.kernels.layout import NIBBLE_BITS

_TILES_OF_WARPGROUP = 4
_CLUSTERS = (1, 2, 4, 8)
_STAGES = (5, 4, 3, 2)
_WARPGROUPS = 2  # of `source/linear_batch.cu`
_BLOCK_COST, _CLUSTER_COST = 4, 6  # what a block does besides its columns, in tiles of them


@dataclass(frozen=True, slots=True)
class RingOperands:
    """What passes through a block's ring (`source/ring.cuh`): codes and parts of a width, inputs in n-tiles of a pass."""

    bit_width: int
    group_size: int
    part_bytes: int
    pass_tiles: int

    @property
    def groups(self) -> int:
        """Of a tile of columns."""
        return TILE_COLUMNS // self.group_size

    @property
    def pass_tokens(self) -> int:
        return self.pass_tiles * TILE_TOKENS

    def stage_bytes(self, warpgroups: int) -> int:
        parts = (1 if self.bit_width <= NIBBLE_BITS else 2) * self.groups * TILE_ROWS * 2 * self.part_bytes
        weights = TILE_ROWS * TILE_COLUMNS * self.bit_width // 8 + parts
        return self.pass_tiles * 8 * TILE_COLUMNS + warpgroups * _TILES_OF_WARPGROUP * weights


_BARRIERS_OF_STAGE = 16
_Tiling = TypeVar("_Tiling", bound="WarpgroupTiling")


class WarpgroupTiling(Protocol):
    """`warpgroups` of 64 rows a block, `cluster` blocks that share the columns, `stages` of the ring."""

    @property
    def warpgroups(self) -> int: ...

    @property
    def cluster(self) -> int: ...

    @property
    def stages(self) -> int: ...

    def shared_bytes(self, operands: RingOperands) -> int: ...


@dataclass(frozen=True, slots=True)
class BatchTiling:
    """Constants of `source/linear_batch.cu`; `segments` as of a `Tiling`."""

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
    cluster: int
    stages: int

    def shared_bytes(self, operands: RingOperands) -> int:
        ring = self.stages * operands.stage_bytes(self.warpgroups)
        sums = operands.pass_tokens * (64 * self.warpgroups + 4) * 4
        return max(ring, sums) + self.stages * _BARRIERS_OF_STAGE


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
    segments = num_segments(out_features, in_features)

    def candidates() -> Iterable[list[BatchTiling]]:
        for cluster in _CLUSTERS:
            if segments % cluster == 0:
                yield [BatchTiling(_WARPGROUPS, cluster, stages, segments) for stages in _STAGES]

    return _soonest(candidates(), out_features, in_features, passes, operands, limits, lambda tiling: 1.0)


@functools.cache
def default_values_tiling(
    out_features: int, in_features: int, passes: int, operands: RingOperands, limits: Limits
) -> ValuesTiling:
    """What ends soonest if a multiprocessor takes as long for a tile of columns as it has warpgroups."""

    def candidates() -> Iterable[list[ValuesTiling]]:
        for warpgroups in (2, 3, 4):
            for cluster in _CLUSTERS:
                if cluster == 1 or cluster * TILE_COLUMNS <= in_features:
                    yield [ValuesTiling(warpgroups, cluster, stages) for stages in _STAGES]

    return _soonest(
        candidates(),
        out_features,
        in_features,
        passes,
        operands,
        limits,
        lambda tiling: tiling.warpgroups / _WARPGROUPS,
    )


def _soonest(
    candidates: Iterable[list[_Tiling]],
    out_features: int,
    in_features: int,
    passes: int,
    operands: RingOperands,
    limits: Limits,
    tile_cost: Callable[[_Tiling], float],
) -> _Tiling:
    """The best of candidates that differ in their stages alone, most of them first, and the best of these."""
    column_tiles = -(-in_features // TILE_COLUMNS)
    fewest, best = math.inf, None
    for tilings in candidates:
        fitting = next((tiling for tiling in tilings if tiling.shared_bytes(operands) <= limits.shared_bytes), None)
        if fitting is None:
            continue
        blocks = num_blocks(out_features, fitting) * fitting.cluster * passes
        other_work = _BLOCK_COST if fitting.cluster == 1 else _CLUSTER_COST
        cost = -(-blocks // limits.multiprocessors) * (column_tiles / fitting.cluster + other_work) * tile_cost(fitting)
        if cost < fewest:
            fewest, best = cost, fitting
    if best is None:
        raise ValueError("No block has that much shared memory.")
    return best
