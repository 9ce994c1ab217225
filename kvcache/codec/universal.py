"""The codebooks that serve every model: clustered once on rotated, normalised vectors, which all models' look like.

`python -m anybit.kvcache.codec.universal FILE` makes the file that ships, `universal.json`, anew.
"""

import functools
import json
import sys
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from anybit.kvcache.codec.clustering import cluster, nearest
from anybit.kvcache.codec.pairs import PairTable, TreeTable

PAIR_BITS = (4, 6, 8)
"""Bits of a pair's code, two, three and four an element."""
TREE = "tree"
"""The table of 8 bits whose highest 4 are a code of the table of 4 bits."""

_LARGEST_ENTRY = 127
_HEAD_DIM = 128
_VECTORS = 1 << 13
_ITERATIONS = 100
_RESTARTS = 4
_SEED = 0


@functools.cache
def universal_table(bits: int) -> PairTable:
    """The direct table of codes of `bits` bits a pair."""
    return PairTable(_entries(str(bits)))


@functools.cache
def tree_table() -> TreeTable:
    """The table of 8 bits in which a code's highest 4 bits are a code of `universal_table(4)`: its residual is clustered."""
    return TreeTable(_entries(TREE), universal_table(PAIR_BITS[0]))


@functools.cache
def _stored() -> dict[str, dict[str, object]]:
    stored: dict[str, dict[str, object]] = json.loads((files(__package__) / "universal.json").read_text())
    return stored


def _entries(name: str) -> Tensor:
    return _levels(_stored()[name])


def train() -> dict[str, dict[str, object]]:
    """Cluster ordered pairs of random vectors of unit mean square; entries are multiples of a step, up to ±127 of it."""
    generator = torch.Generator().manual_seed(_SEED)
    vectors = torch.randn(_VECTORS, _HEAD_DIM, generator=generator)
    vectors *= _HEAD_DIM**0.5 / vectors.norm(dim=1, keepdim=True)
    pairs = vectors.view(-1, 2)
    points = torch.stack((pairs.amax(1), pairs.amin(1)), dim=1)
    tables = {str(bits): _as_bytes(_best(points, 1 << (bits - 1), generator)) for bits in PAIR_BITS}
    coarse = _levels(tables[str(PAIR_BITS[0])])
    labels, _ = nearest(points, coarse)
    residuals = [points[labels == index] - coarse[index] for index in range(len(coarse))]
    children = [_best(residual, 16, generator) + parent for residual, parent in zip(residuals, coarse, strict=True)]
    tables[TREE] = _as_bytes(torch.cat(children))
    return tables


def _best(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    found = [cluster(points, count, _ITERATIONS, generator) for _ in range(_RESTARTS)]
    best = min(found, key=lambda centroids: float(nearest(points, centroids)[1].mean()))
    return best[best.norm(dim=1).argsort()]


def _as_bytes(entries: Tensor) -> dict[str, object]:
    step = float(entries.abs().max()) / _LARGEST_ENTRY
    return {"step": step, "entries": (entries / step).round().to(torch.int32).tolist()}


def _levels(table: dict[str, object]) -> Tensor:
    return torch.tensor(table["entries"], dtype=torch.float32) * float(str(table["step"]))


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps(train()) + "\n")


if __name__ == "__main__":
    main()
