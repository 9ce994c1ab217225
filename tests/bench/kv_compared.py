"""The formats of keys and values that are compared: AnyBit's own and others, each as codecs and a basis of its pages."""

from dataclasses import dataclass

from kv_rivals import BlockCodec, ExactCodec, GroupCodec, gaussian_table, in_pairs, swapped_table
from torch import Tensor

from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec, UniformCodec
from anybit.kvcache.codec.pairs import Table
from anybit.kvcache.codec.universal import tree_table, universal_table


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Codecs of keys and values, and whether their pages are rotated, and keys balanced before that."""

    keys: PageCodec
    values: PageCodec
    is_rotated: bool = False
    is_balanced: bool = False

    def basis(self, head_dim: int, weights: Tensor | None) -> PageBasis:
        return PageBasis(head_dim, weights if self.is_balanced else None, self.is_rotated, self.is_rotated)


def page_formats() -> dict[str, PageFormat]:
    """By name; where no number says otherwise the bits of a name are those of an element's code."""
    found = {"bf16 as codes": PageFormat(ExactCodec(), ExactCodec())}
    for bits in (4, 3, 2):
        qet = universal_table(2 * bits)
        lloyd_max = in_pairs(gaussian_table(1, bits))
        found |= {
            f"qet{bits}": _balanced(qet),
            f"qet{bits}, keys not balanced": _rotated(qet),
            f"k-means of pairs, no reorder, {bits}": _balanced(gaussian_table(2, 2 * bits)),
            f"rotation + Lloyd-Max {bits}": PageFormat(
                PairCodec(lloyd_max, has_mean=False), PairCodec(lloyd_max, has_mean=False), is_rotated=True
            ),
            f"rotation + Lloyd-Max {bits}, mean and balance as qet": _balanced(lloyd_max),
            f"QET with three swap layers {bits}": _balanced(swapped_table(3, 2 * bits)),
            f"uniform {bits}": PageFormat(UniformCodec(bits, "channel"), UniformCodec(bits, "token")),
            f"KIVI {bits}, groups of 32": PageFormat(GroupCodec(bits, "tokens"), GroupCodec(bits, "channels")),
        }
    tree = tree_table()
    coarse = CoarseCodec(tree, has_mean=True), CoarseCodec(tree, has_mean=False)
    return found | {
        "qet2+2": _balanced(tree),
        "qet2+2 read at 2": PageFormat(*coarse, is_rotated=True, is_balanced=True),
        "uniform 8": PageFormat(UniformCodec(8, "channel"), UniformCodec(8, "token")),
        "q4_0": PageFormat(BlockCodec(), BlockCodec()),
        "q4_0 + Hadamard": PageFormat(BlockCodec(), BlockCodec(), is_rotated=True),
    }


def balanced(keys: Table, values: Table) -> PageFormat:
    """QET's serving form with these tables."""
    return _less_mean(keys, values, is_balanced=True)


def _balanced(table: Table) -> PageFormat:
    return balanced(table, table)


def _rotated(table: Table) -> PageFormat:
    return _less_mean(table, table, is_balanced=False)


def _less_mean(keys: Table, values: Table, is_balanced: bool) -> PageFormat:
    """Keys less the page's mean."""
    return PageFormat(PairCodec(keys, has_mean=True), PairCodec(values, has_mean=False), True, is_balanced)
