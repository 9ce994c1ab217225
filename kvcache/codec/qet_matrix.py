"""QET as published: a matrix reordered, its columns clustered in groups, and the residual clustered again.

arXiv 2407.03637 and the algorithm its authors released: swap trees of adjacent elements, product quantization of the
reordered columns, a second stage on what is left over in the original order, codebooks of 10 bits, 70 % and 30 % of the
budget. The codebooks are part of what is stored, so this compresses whole matrices (a layer's keys, a weight), not a
cache that grows token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kvcache.codec.clustering import cluster, nearest

CODEBOOK_BITS = 10
_NUMBER_BITS = 32  # the scale and the minimum of a stage's codebooks


@dataclass(frozen=True, slots=True)
class QetOptions:
    """`swap_layers` and `budget_shares` per stage; `codebook_bits` None keeps codebooks in float32 (plain PQ)."""

    num_groups: int = 4
    swap_layers: tuple[int, ...] = (3, 0)
    budget_shares: tuple[float, ...] = (0.7, 0.3)
    codebook_bits: int | None = CODEBOOK_BITS
    iterations: int = 20


def product_quantization(num_groups: int) -> QetOptions:
    """The paper's baseline: one stage of float32 codebooks, nothing reordered."""
    return QetOptions(num_groups, swap_layers=(0,), budget_shares=(1.0,), codebook_bits=None)


@dataclass(frozen=True, slots=True)
class QetStage:
    """Swap bits bool [rows, columns/2] per layer, codebooks [groups, centroids, width] and labels int64 [groups, rows]."""

    swaps: tuple[Tensor, ...]
    codebooks: Tensor
    labels: Tensor

    def decode(self) -> Tensor:
        """float32 [rows, columns], in the original order."""
        groups = [book[label] for book, label in zip(self.codebooks, self.labels, strict=True)]
        return restore(torch.cat(groups, dim=1), self.swaps)


@dataclass(frozen=True, slots=True)
class QetMatrix:
    """A compressed matrix and the bits of everything stored, by what they are spent on."""

    stages: tuple[QetStage, ...]
    bits: dict[str, int]

    def decode(self) -> Tensor:
        return torch.stack([stage.decode() for stage in self.stages]).sum(0)


def reorder(matrix: Tensor, num_layers: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Put adjacent elements of every row in order, smaller ones into the left half, and so on in each half.

    matrix [rows, columns], columns a multiple of 2^num_layers. Returns the reordered matrix and, per layer, which pairs
    were exchanged: bool [rows, columns/2], for all rows and blocks in one comparison.
    """
    rows, columns = matrix.shape
    if columns % (1 << num_layers):
        raise ValueError(f"{columns} columns cannot be halved {num_layers} times.")
    swaps = []
    for layer in range(num_layers):
        pairs = matrix.view(rows, 1 << layer, -1, 2)
        swaps.append((pairs[..., 0] < pairs[..., 1]).view(rows, -1))
        matrix = torch.stack((pairs.amin(-1), pairs.amax(-1)), dim=2).view(rows, columns)
    return matrix, tuple(swaps)


def restore(matrix: Tensor, swaps: Sequence[Tensor]) -> Tensor:
    """Inverse of `reorder`, deepest layer first."""
    rows, columns = matrix.shape
    for layer in reversed(range(len(swaps))):
        halves = matrix.view(rows, 1 << layer, 2, -1)
        low, high = halves[:, :, 0], halves[:, :, 1]
        was_smaller = swaps[layer].view_as(low)
        first, second = torch.where(was_smaller, low, high), torch.where(was_smaller, high, low)
        matrix = torch.stack((first, second), dim=-1).view(rows, columns)
    return matrix


def compress(matrix: Tensor, budget_bits: float, options: QetOptions, generator: torch.Generator) -> QetMatrix:
    """Compress float32 [rows, columns] into at most `budget_bits` bits an element, everything stored counted.

    ValueError if a number is not finite, if rows cannot be cut as `options` asks, or if the budget holds no codebook.
    """
    rows, columns = matrix.shape
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("A matrix with numbers that are not finite cannot be compressed.")
    if columns % options.num_groups:
        raise ValueError(f"{columns} columns cannot be cut into {options.num_groups} equal groups.")
    swap_bits = sum(options.swap_layers) * rows * columns // 2
    left = budget_bits * rows * columns - swap_bits
    bits = {"swaps": swap_bits, "codes": 0, "codebooks": 0}
    residual = matrix.to(torch.float32)
    stages = []
    for num_layers, share in zip(options.swap_layers, options.budget_shares, strict=True):
        count = _num_centroids(rows, columns, share * left, options)
        ordered, swaps = reorder(residual, num_layers)
        books, labels = _cluster_groups(ordered, count, options, generator)
        stage = QetStage(swaps, books, labels)
        stages.append(stage)
        residual = residual - stage.decode()
        bits["codes"] += options.num_groups * rows * _index_bits(count)
        bits["codebooks"] += _codebook_bits(count, columns, options)
    return QetMatrix(tuple(stages), bits)


def _cluster_groups(
    ordered: Tensor, count: int, options: QetOptions, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    groups = ordered.view(len(ordered), options.num_groups, -1).transpose(0, 1)
    books = torch.stack([cluster(group, count, options.iterations, generator) for group in groups])
    if options.codebook_bits is not None:
        books = _rounded(books, options.codebook_bits)
    return books, torch.stack([nearest(group, book)[0] for group, book in zip(groups, books, strict=True)])


def _rounded(books: Tensor, bits: int) -> Tensor:
    """All codebooks of a stage on one grid of 2^bits levels."""
    low, high = books.min(), books.max()
    step = ((high - low) / ((1 << bits) - 1)).clamp_min(torch.finfo(books.dtype).tiny)
    return ((books - low) / step).round_() * step + low


def _num_centroids(rows: int, columns: int, budget: float, options: QetOptions) -> int:
    """The largest codebook whose entries and codes fit into `budget` bits, fewer than rows."""

    def cost(count: int) -> int:
        return _codebook_bits(count, columns, options) + options.num_groups * rows * _index_bits(count)

    low, high = 1, rows - 1
    if high < 1 or cost(low) > budget:
        raise ValueError(f"A budget of {budget:.0f} bits holds no codebook for {rows} rows of {columns} columns.")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def _codebook_bits(count: int, columns: int, options: QetOptions) -> int:
    if options.codebook_bits is None:
        return count * columns * _NUMBER_BITS
    return count * columns * options.codebook_bits + 2 * _NUMBER_BITS


def _index_bits(count: int) -> int:
    return (count - 1).bit_length()
