"""What each width of a checkpoint costs, counted from its manifest (FORMATS, bit accounting)."""

from collections.abc import Iterable

from anybit.engine.types import WidthInfo
from anybit.engine.weights.checkpoint import FLOAT_DTYPES
from anybit.engine.weights.manifest import Manifest, TensorEntry
from anybit.kernels import layout

VOCABULARY_NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def linear_entries(manifest: Manifest) -> list[TensorEntry]:
    """The weights that a request's own width decides."""
    return [entry for name, entry in manifest.tensors.items() if name not in VOCABULARY_NAMES]


def vocabulary_entries(manifest: Manifest) -> list[TensorEntry]:
    """Embedding and, where it is not the same matrix, LM head: read at one fixed width. The head is the last."""
    return [manifest.tensors[name] for name in VOCABULARY_NAMES if name in manifest.tensors]


def bytes_read(entries: Iterable[TensorEntry], bit_width: int) -> int:
    """Bytes of codes and float parts that one pass over `entries` reads."""
    return sum(_codes(entry, bit_width) + layout.num_float_parts(bit_width) * _floats(entry) for entry in entries)


def float_part_bytes(entries: Iterable[TensorEntry], bit_width: int) -> int:
    """Those of `bytes_read` that are not codes."""
    return sum(layout.num_float_parts(bit_width) * _floats(entry) for entry in entries)


def bytes_resident(entries: Iterable[TensorEntry], bit_widths: Iterable[int]) -> int:
    """Bytes in memory when all of `bit_widths` can be read: one copy of the codes, a float part per width."""
    widths = set(bit_widths)
    if max(widths) > layout.NIBBLE_BITS:
        widths.add(layout.NIBBLE_BITS)
    return sum(_codes(entry, max(widths)) + 2 * len(widths) * _floats(entry) for entry in entries)


def effective_bits(entries: Iterable[TensorEntry], bit_width: int) -> float:
    """Bits read per weight, float parts counted."""
    counted = list(entries)
    return layout.CODE_BITS * bytes_read(counted, bit_width) / _num_weights(counted)


def width_info(manifest: Manifest, bit_width: int, lm_head_bits: int) -> WidthInfo:
    """One row of the table of widths."""
    linears, tables = linear_entries(manifest), vocabulary_entries(manifest)
    linear_bytes, table_bytes = bytes_read(linears, bit_width), bytes_read(tables, lm_head_bits)
    return WidthInfo(
        bit_width=bit_width,
        effective_bits=effective_bits(linears, bit_width),
        effective_bits_with_head=layout.CODE_BITS * (linear_bytes + table_bytes) / _num_weights([*linears, *tables]),
        bytes_read_per_token=linear_bytes + bytes_read(tables[-1:], lm_head_bits),
        equivalent_bytes=linear_bytes + table_bytes,
        perplexity=manifest.perplexity.get(str(bit_width)),
    )


def _codes(entry: TensorEntry, bit_width: int) -> int:
    return layout.code_bytes(entry.shape[0], entry.shape[1], bit_width)


def _floats(entry: TensorEntry) -> int:
    """Bytes of one number per (group, row)."""
    groups = layout.padded_rows(entry.shape[0]) * (entry.shape[1] // entry.group_size)
    return groups * int(FLOAT_DTYPES[entry.float_dtype].itemsize)


def _num_weights(entries: Iterable[TensorEntry]) -> int:
    return sum(entry.shape[0] * entry.shape[1] for entry in entries)
