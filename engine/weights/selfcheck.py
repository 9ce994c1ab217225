"""Compares what the kernels that serve compute with what the checkpoint says, on random tiles of the weights.

A tile is eight rows by one group of inputs. Activations that are zero outside the group go through `kernels.dispatch`
with the whole weight as it lies in memory; the same go in float64 through `kernels.reference`'s dequantization of the tile,
read from the checkpoint's canonical streams. With m the group's largest activation, a result may differ by

    a·m·Σ|w|  +  16·2⁻²⁴·Σ|x|·(|s|·levels + |z|)

where a is the error of the kernels' fixed point activations (`dispatch.activation_error`: 1/32638 of m natively, 1/16254 in
PyTorch) and the second term is float32's rounding of scales times sums. Both are bounds, not estimates: whatever is beyond
them is a fault of memory, packing or kernels.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.engine.errors import KernelError
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import LoadedWeight, NestedLoader
from anybit.engine.weights.tiles import TILE_ROWS, Budget, Tile, WeightShape, draw_tiles, stack_tiles
from anybit.kernels import dispatch, layout, reference
from anybit.kernels.cpu.bindings import is_native
from anybit.kernels.cpu.threads import one_thread
from anybit.kernels.dispatch import ServedWeight
from anybit.kernels.nested import NestedWeight
from anybit.kernels.widths import WidthSegment

NUM_TILES = 1000
# At most a second or three on one thread of PyTorch's kernels, or of native ones without vector instructions.
_BUDGET = Budget(products=800_000_000, layers=64, groups=4)
_BUDGET_WITHOUT_KERNELS = Budget(products=400_000_000, layers=64, groups=4)
_ROUNDING = 16 * 2.0**-24
_SLACK = 1.01  # fixed point numbers are themselves found in float32


@dataclass(frozen=True, slots=True)
class SelfCheckReport:
    """A check that was passed; `worst_error` is relative to the sum of the magnitudes of the products in a result.

    The same `seed` draws the same tiles.
    """

    tiles: int
    weights: int
    bit_widths: tuple[int, ...]
    worst_error: float
    seed: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.tiles} random tiles of {self.weights} weights at {', '.join(map(str, self.bit_widths))} bits agree with "
            f"the checkpoint (worst relative error {self.worst_error:.1e}, seed {self.seed}, {self.seconds:.2f} s)"
        )


def check_loaded(
    reader: CheckpointReader,
    loaded: Sequence[LoadedWeight],
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> SelfCheckReport:
    """Check weights in the memory of `device` against the checkpoint they came from; without a seed, other tiles each time.

    KernelError names the weight, rows, inputs and width of the first tile that differs.
    """
    weights = [_StoredWeight(reader, weight.names, weight.bit_widths) for weight in loaded]
    return _check(weights, lambda index, bit_widths: loaded[index].weight, device, seed)


def check_checkpoint(directory: Path, device: torch.device | str = "cpu", seed: int | None = None) -> SelfCheckReport:
    """Load weights of a finished checkpoint one after the other, each tensor alone, and check them at all their widths.

    KernelError as `check_loaded`; CheckpointError if the checkpoint cannot be read.
    """
    reader = CheckpointReader(directory)
    bit_widths = reader.manifest.bit_widths
    loader = NestedLoader(reader, bit_widths, max(bit_widths), device)
    weights = [_StoredWeight(reader, (name,), bit_widths) for name in reader.manifest.tensors]
    return _check(weights, lambda index, wanted: loader.read(weights[index].names, wanted), device, seed)


class _StoredWeight:
    """Weights of a checkpoint that are stacked along the output when they are loaded."""

    def __init__(self, reader: CheckpointReader, names: tuple[str, ...], bit_widths: tuple[int, ...]) -> None:
        entries = [reader.entry(name) for name in names]
        self.names = names
        self.shape = WeightShape(
            sum(entry.shape[0] for entry in entries), entries[0].shape[1], entries[0].group_size, bit_widths
        )
        self._reader = reader
        self._blocks = [layout.padded_rows(entry.shape[0]) // TILE_ROWS for entry in entries]

    def tiles(self, tiles: Sequence[Tile], bit_width: int) -> NestedWeight:
        """These tiles from the mapped files, stacked."""
        located = [self.locate(tile) for tile in tiles]
        mapped = {name: self._reader.mapped(name, bit_width) for name in {name for name, _ in located}}
        return stack_tiles([(mapped[name], tile) for name, tile in located], bit_width)

    def locate(self, tile: Tile) -> tuple[str, Tile]:
        """The name of the weight in the checkpoint that holds the tile, and which of its tiles that is."""
        block = tile.block
        for name, num_blocks in zip(self.names, self._blocks, strict=True):
            if block < num_blocks:
                return name, Tile(tile.weight, tile.bit_width, tile.group, block)
            block -= num_blocks
        raise IndexError(tile.block)


def _check(
    weights: Sequence[_StoredWeight],
    load: Callable[[int, Sequence[int]], ServedWeight],
    device: torch.device | str,
    given_seed: int | None,
) -> SelfCheckReport:
    started = time.perf_counter()
    seed = secrets.randbits(32) if given_seed is None else given_seed
    generator = torch.Generator().manual_seed(seed)
    slow = torch.device(device).type == "cpu" and not is_native()
    budget = _BUDGET_WITHOUT_KERNELS if slow else _BUDGET
    tiles = draw_tiles([weight.shape for weight in weights], NUM_TILES, budget, seed)
    worst = 0.0
    # So few rows are computed sooner than threads have met, above all on a machine that has other work too.
    with one_thread():
        for index, drawn in groupby(tiles, key=lambda tile: tile.weight):
            of_weight = list(drawn)
            probe = _Probe.draw(of_weight, weights[index].shape, generator)
            served = load(index, sorted({tile.bit_width for tile in of_weight}))
            worst = max(worst, _compare(weights[index], served, probe, of_weight, device))
    return SelfCheckReport(
        tiles=len(tiles),
        weights=len({tile.weight for tile in tiles}),
        bit_widths=tuple(sorted({tile.bit_width for tile in tiles})),
        worst_error=worst,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """Activations for one weight: a row per bit-width and group among its tiles, zero outside the group."""

    rows: dict[tuple[int, int], int]  # (bit-width, group) -> row
    values: Tensor  # float32 [rows, group_size]
    x: Tensor  # float32 [rows, in]

    @staticmethod
    def draw(tiles: Sequence[Tile], shape: WeightShape, generator: torch.Generator) -> "_Probe":
        """Magnitudes from a half to one: none is so small that a wrong code beside it would go unnoticed."""
        keys = sorted({(tile.bit_width, tile.group) for tile in tiles})
        values = torch.rand(len(keys), shape.group_size, generator=generator).add_(1).mul_(0.5)
        values *= torch.randint(2, values.shape, generator=generator) * 2 - 1
        x = torch.zeros(len(keys), shape.num_groups, shape.group_size)
        x[torch.arange(len(keys)), torch.tensor([group for _, group in keys])] = values
        return _Probe({key: row for row, key in enumerate(keys)}, values, x.view(len(keys), shape.in_features))

    @property
    def segments(self) -> list[WidthSegment]:
        widths = [width for width, _ in self.rows]
        return [
            (width, widths.index(width), widths.index(width) + widths.count(width)) for width in sorted(set(widths))
        ]


def _compare(
    stored: _StoredWeight, served: ServedWeight, probe: _Probe, tiles: Sequence[Tile], device: torch.device | str
) -> float:
    """The largest relative error of a weight's tiles; KernelError if one is beyond what is possible."""
    results = dispatch.linear(probe.x.to(device), served, probe.segments).to("cpu", torch.float64)
    padding = -results.shape[1] % TILE_ROWS
    results = F.pad(results, (0, padding)).view(results.shape[0], -1, TILE_ROWS)
    worst = 0.0
    for width, drawn in groupby(tiles, key=lambda tile: tile.bit_width):
        of_width = list(drawn)
        rows = torch.tensor([probe.rows[width, tile.group] for tile in of_width])
        blocks = torch.tensor([tile.block for tile in of_width])
        expected = _Expected.of(stored.tiles(of_width, width), width, probe.values[rows])
        exists = blocks[:, None] * TILE_ROWS + torch.arange(TILE_ROWS) < stored.shape.out_features
        error = torch.where(exists, (results[rows, blocks] - expected.result).abs(), 0.0)
        allowed = expected.allowed(dispatch.activation_error(served))
        wrong = ~(error <= allowed).all(1)  # NaN is wrong too
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise _kernel_error(stored, of_width[first], float(error[first].max()), float(allowed[first].max()))
        worst = max(worst, float((error / expected.magnitude.clamp(min=torch.finfo(torch.float64).tiny)).max()))
    return worst


@dataclass(frozen=True, slots=True)
class _Expected:
    """What tiles give by definition, float64 [tiles, rows], and what bounds the error of a kernel."""

    result: Tensor
    magnitude: Tensor  # Σ|x·w|
    largest: Tensor  # m·Σ|w|
    reach: Tensor  # Σ|x|·(|s|·levels + |z|)

    @staticmethod
    def of(tiles: NestedWeight, bit_width: int, values: Tensor) -> "_Expected":
        """values float32 [tiles, group_size]."""
        weight = reference.dequantize(tiles, bit_width).double().view(values.shape[0], TILE_ROWS, -1)
        x = values.double().unsqueeze(1)  # [tiles, 1, group_size]
        sizes = x.abs()
        return _Expected(
            result=(x * weight).sum(2),
            magnitude=(sizes * weight.abs()).sum(2),
            largest=sizes.amax(2) * weight.abs().sum(2),
            reach=sizes.sum(2) * _reach(tiles, bit_width).view(values.shape[0], TILE_ROWS),
        )

    def allowed(self, activation_error: float) -> Tensor:
        return _SLACK * activation_error * self.largest + _ROUNDING * self.reach


def _reach(tiles: NestedWeight, bit_width: int) -> Tensor:
    """Per row what the terms of a weight can add up to: float64 [rows]."""
    part = tiles.affine[bit_width]
    upper = min(bit_width, layout.NIBBLE_BITS)
    reach = part.zero.double().abs() + tiles.affine[upper].scale.double().abs() * ((1 << upper) - 1)
    if bit_width > layout.NIBBLE_BITS:
        reach += part.scale.double().abs() * ((1 << bit_width - layout.NIBBLE_BITS) - 1)
    return reach.view(-1)


def _kernel_error(stored: _StoredWeight, tile: Tile, error: float, allowed: float) -> KernelError:
    name, of_name = stored.locate(tile)
    row, column = of_name.block * TILE_ROWS, tile.group * stored.shape.group_size
    return KernelError(
        f"The kernels read {name} (rows from {row}, inputs from {column}) at {tile.bit_width} bits with an error of "
        f"{error:.2g} where {allowed:.2g} is possible: memory is damaged or these kernels do not work here, so try again, "
        "and if it stays, try others (ANYBIT_CPU_KERNELS=none, --device cpu)."
    )
