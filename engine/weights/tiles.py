"""Random tiles of weights: which ones, and what a checkpoint's canonical streams say about them."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from anybit.kernels import layout
from anybit.kernels.nested import Affine, NestedWeight

TILE_ROWS = layout.ROW_BLOCK


@dataclass(frozen=True, slots=True)
class WeightShape:
    """What of one weight can be drawn."""

    out_features: int
    in_features: int
    group_size: int
    bit_widths: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.out_features * self.in_features

    @property
    def num_blocks(self) -> int:
        return layout.padded_rows(self.out_features) // TILE_ROWS

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """Eight rows by one group of inputs of weight number `weight`, read at `bit_width`."""

    weight: int
    bit_width: int
    group: int
    block: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be computed: products of weights and activations, linear layers at one width, and groups in each."""

    products: int
    layers: int
    groups: int


def draw_tiles(shapes: Sequence[WeightShape], count: int, budget: Budget, seed: int) -> list[Tile]:
    """`count` different tiles in ascending order, or all where there are fewer; the same ones for the same seed.

    They are spread over the weights first, then over the widths. One row of activations that are zero outside a group
    computes all tiles of that group, and whatever else the weight has rows for; so that all this stays within the budget,
    tiles of larger models come from fewer weights and share groups. Every width is always among them.
    """
    rng = random.Random(seed)
    places = _affordable(_places(shapes, rng), shapes, budget)[:count]
    groups_per_place = budget.products // max(1, sum(shapes[weight].size for weight, _ in places))
    most_groups = min(max(1, groups_per_place), budget.groups)
    groups = {place: min(shapes[place[0]].num_groups, most_groups) for place in places}

    def capacity(place: tuple[int, int]) -> int:
        return groups[place] * shapes[place[0]].num_blocks

    tiles: list[Tile] = []
    # The smallest first: what they cannot give is shared by those that can.
    for index, place in enumerate(sorted(places, key=capacity)):
        wanted = min(capacity(place), math.ceil((count - len(tiles)) / (len(places) - index)))
        shape = shapes[place[0]]
        drawn = rng.sample(range(shape.num_groups), min(groups[place], wanted))
        picks = rng.sample(range(len(drawn) * shape.num_blocks), wanted)
        tiles += [Tile(*place, drawn[pick // shape.num_blocks], pick % shape.num_blocks) for pick in picks]
    return sorted(tiles)


def stack_tiles(tiles: Iterable[tuple[NestedWeight, Tile]], bit_width: int) -> NestedWeight:
    """The streams and float parts of tiles of one group size, cut out of the weights that hold them and stacked:
    [8 rows a tile, one group]."""
    cuts = [_cut(weight, tile) for weight, tile in tiles]
    parts = {width: [cut.affine[width] for cut in cuts] for width in cuts[0].affine}
    return NestedWeight(
        out_features=TILE_ROWS * len(cuts),
        in_features=cuts[0].in_features,
        group_size=cuts[0].in_features,
        chunks={
            chunk.name: torch.cat([cut.chunks[chunk.name] for cut in cuts]) for chunk in layout.chunks_for(bit_width)
        },
        affine={
            width: Affine(torch.cat([part.scale for part in cut], 1), torch.cat([part.zero for part in cut], 1))
            for width, cut in parts.items()
        },
    )


def _places(shapes: Sequence[WeightShape], rng: random.Random) -> Iterator[tuple[int, int]]:
    """Every (weight, bit-width): all weights in random order, each at another of its widths than the last, and again."""
    order = rng.sample(range(len(shapes)), len(shapes))
    for turn in range(max((len(shape.bit_widths) for shape in shapes), default=0)):
        for position, weight in enumerate(order):
            widths = shapes[weight].bit_widths
            if turn < len(widths):
                yield weight, widths[(position + turn) % len(widths)]


def _affordable(
    places: Iterable[tuple[int, int]], shapes: Sequence[WeightShape], budget: Budget
) -> list[tuple[int, int]]:
    """The first place of every width, and of the others those that fit."""
    ordered = list(places)
    first_of_width = {width: (weight, width) for weight, width in reversed(ordered)}
    taken = list(first_of_width.values())
    products = sum(shapes[weight].size for weight, _ in taken)
    for place in ordered:
        size = shapes[place[0]].size
        if len(taken) < budget.layers and products + size <= budget.products and place not in taken:
            taken.append(place)
            products += size
    return taken


def _cut(weight: NestedWeight, tile: Tile) -> NestedWeight:
    """A view of one tile."""
    rows = weight.rows(tile.block * TILE_ROWS, (tile.block + 1) * TILE_ROWS)
    inputs = slice(tile.group * weight.group_size, (tile.group + 1) * weight.group_size)
    group = slice(tile.group, tile.group + 1)
    return NestedWeight(
        out_features=TILE_ROWS,
        in_features=weight.group_size,
        group_size=weight.group_size,
        chunks={name: chunk[:, inputs] for name, chunk in rows.chunks.items()},
        affine={width: Affine(part.scale[group], part.zero[group]) for width, part in rows.affine.items()},
    )
