"""Ordered pairs: two adjacent elements put in order, and their cluster in the half-plane where ordered pairs lie.

QET's reordering in the form that costs nothing: the swap bit and the index of the cluster together are the code of a
pair, and the table is half as large as that of a free codebook of the same rate (reference: KVCACHE, form 2).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from anybit.kvcache.codec.clustering import nearest
from anybit.kvcache.codec.nearest_grid import NearestGrid

_FEW_ENTRIES = 16  # that are compared with every pair sooner than a cell is looked up


class Table(Protocol):
    """Codes of `bits` bits for adjacent elements, and what they stand for."""

    @property
    def bits(self) -> int:
        """Of a code."""

    def encode(self, values: Tensor) -> Tensor:
        """float32 [..., n] -> uint8 [..., codes]."""

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 [..., codes] -> float32 [..., n]."""


@dataclass(frozen=True, slots=True)
class PairTable:
    """`entries` float32 [2^(bits−1), 2], the first element never below the second.

    The highest bit of a code says that the elements were exchanged, the others name the entry.
    """

    entries: Tensor
    _grid: NearestGrid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_grid", NearestGrid(self.entries))

    @property
    def bits(self) -> int:
        return len(self.entries).bit_length()

    @property
    def levels(self) -> Tensor:
        """The pair that each code stands for, in its original order: float32 [2^bits, 2]."""
        return torch.cat((self.entries, self.entries.flip(1)))

    @property
    def clusters(self) -> Tensor:
        """Of which the nearest is chosen before its entries are compared, float32 [clusters, 2]: here a single one."""
        return self.entries.mean(0, keepdim=True)

    def encode(self, values: Tensor) -> Tensor:
        pairs = values.reshape(-1, 2)
        swapped = pairs[:, 0] < pairs[:, 1]
        index = self.index(torch.stack((pairs.amax(1), pairs.amin(1)), dim=1))
        codes = index | (swapped.to(index.dtype) << (self.bits - 1))
        return codes.to(torch.uint8).view(*values.shape[:-1], -1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.levels.to(codes.device)[codes.long()].flatten(-2)

    def index(self, ordered: Tensor) -> Tensor:
        """The entry of each ordered pair: [pairs, 2] -> int64 [pairs]."""
        if len(self.entries) <= _FEW_ENTRIES:
            return nearest(ordered, self.entries.to(ordered.device))[0]
        return self._grid.search(ordered)


@dataclass(frozen=True, slots=True)
class TreeTable(PairTable):
    """A table whose codes begin with codes of `coarse`: the residual of each of its clusters is clustered again.

    A page is encoded once and can be read by either table; the entries of a cluster follow each other.
    """

    coarse: PairTable

    @property
    def clusters(self) -> Tensor:
        return self.coarse.entries

    def index(self, ordered: Tensor) -> Tensor:
        parent = self.coarse.index(ordered)
        children = self.entries.to(ordered.device).view(len(self.coarse.entries), -1, 2)
        index = torch.empty_like(parent)
        for cluster, entries in enumerate(children):
            members = (parent == cluster).nonzero()[:, 0]
            index[members] = nearest(ordered[members], entries)[0]
        return parent * children.shape[1] + index
