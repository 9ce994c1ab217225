"""The nested weight: integer codes shared by all widths and one float part per width."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels import layout


@dataclass(frozen=True, slots=True)
class Affine:
    """The float part of one width: a step and an offset per (group, row), each [in/group_size, padded rows].

    For r ≤ 4, Ŵ_r = scale·(hi >> (4−r)) + zero. For r > 4, `scale` is t_r, the step of the residual nibble, and
    Ŵ_r = s_4·hi + scale·(lo >> (8−r)) + zero, with s_4 the 4-bit width's scale (FORMATS, section 1).
    """

    scale: Tensor
    zero: Tensor

    @property
    def nbytes(self) -> int:
        return self.scale.nbytes + self.zero.nbytes


@dataclass(frozen=True, slots=True)
class NestedWeight:
    """A weight [out, in] that can be read at each of its widths from one copy of the codes.

    `chunks` maps stream names to packed codes (`kernels.layout`); `affine` maps a width to its float part. Streams
    below the largest width wanted may be absent. Rows are stored padded to a multiple of `layout.ROW_BLOCK`.
    """

    out_features: int
    in_features: int
    group_size: int
    chunks: Mapping[str, Tensor]
    affine: Mapping[int, Affine]

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Widths that can be read: their float part and all of their streams are present."""
        return tuple(
            width
            for width in sorted(self.affine)
            if all(chunk.name in self.chunks for chunk in layout.chunks_for(width))
            and (width <= layout.NIBBLE_BITS or layout.NIBBLE_BITS in self.affine)
        )

    @property
    def num_groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes resident in memory."""
        return sum(chunk.nbytes for chunk in self.chunks.values()) + sum(part.nbytes for part in self.affine.values())

    def bytes_read(self, bit_width: int) -> int:
        """Bytes that one pass at `bit_width` reads: codes and float part."""
        part = self.affine[bit_width].scale
        floats = layout.num_float_parts(bit_width) * part.numel() * part.element_size()
        return layout.code_bytes(self.out_features, self.in_features, bit_width) + floats

    def rows(self, start: int, stop: int) -> "NestedWeight":
        """A view of rows start .. stop−1, both multiples of ROW_BLOCK (or the end); no copy."""
        end = layout.padded_rows(stop)
        return NestedWeight(
            out_features=stop - start,
            in_features=self.in_features,
            group_size=self.group_size,
            chunks={
                chunk.name: self.chunks[chunk.name][start // chunk.codes_per_byte : end // chunk.codes_per_byte]
                for chunk in layout.CHUNKS
                if chunk.name in self.chunks
            },
            affine={
                width: Affine(part.scale[:, start:end], part.zero[:, start:end]) for width, part in self.affine.items()
            },
        )

    @staticmethod
    def allocate(
        out_features: int,
        in_features: int,
        group_size: int,
        bit_widths: Iterable[int],
        float_dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "NestedWeight":
        """Uninitialised memory for `bit_widths`; above 4 bits the 4-bit float part is kept too, for s_4."""
        widths = set(bit_widths)
        if max(widths) > layout.NIBBLE_BITS:
            widths.add(layout.NIBBLE_BITS)
        groups = (in_features // group_size, layout.padded_rows(out_features))
        return NestedWeight(
            out_features=out_features,
            in_features=in_features,
            group_size=group_size,
            chunks={
                chunk.name: torch.empty(chunk.shape(out_features, in_features), dtype=torch.uint8, device=device)
                for chunk in layout.chunks_for(max(widths))
            },
            affine={
                width: Affine(
                    torch.empty(groups, dtype=float_dtype, device=device),
                    torch.empty(groups, dtype=float_dtype, device=device),
                )
                for width in sorted(widths)
            },
        )
