"""A solved weight on its way to a checkpoint: 8-bit codes and the float parts of all widths, in float32."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import NestedWeight


@dataclass(frozen=True, slots=True)
class FloatPart:
    """Scale and zero of one width, float32 [out, groups]; above 4 bits `scale` is t_r (FORMATS, section 1)."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """Codes uint8 [out, in] whose top r bits are the code of width r, and a float part per width."""

    codes: Tensor
    parts: Mapping[int, FloatPart]

    @property
    def group_size(self) -> int:
        part = next(iter(self.parts.values()))
        return self.codes.shape[1] // part.scale.shape[1]

    def codes_at(self, bit_width: int) -> Tensor:
        """The top `bit_width` bits: uint8 [out, in]."""
        return self.codes >> (layout.CODE_BITS - bit_width)

    def read(self, bit_width: int) -> Tensor:
        """Ŵ_r: float32 [out, in]."""
        rows = self.codes.shape[0]
        part = self.parts[bit_width]

        def grouped(codes: Tensor) -> Tensor:
            return codes.view(rows, -1, self.group_size).float()

        if bit_width <= layout.NIBBLE_BITS:
            value = grouped(self.codes_at(bit_width)) * part.scale[:, :, None]
        else:
            low = (self.codes & 15) >> (layout.CODE_BITS - bit_width)
            step = self.parts[layout.NIBBLE_BITS].scale[:, :, None]
            value = grouped(self.codes >> layout.NIBBLE_BITS) * step + grouped(low) * part.scale[:, :, None]
        return (value + part.zero[:, :, None]).view(rows, -1)

    def rows(self, start: int, stop: int) -> "CodedWeight":
        parts = {width: FloatPart(part.scale[start:stop], part.zero[start:stop]) for width, part in self.parts.items()}
        return CodedWeight(self.codes[start:stop], parts)

    def to(self, device: torch.device) -> "CodedWeight":
        parts = {width: FloatPart(part.scale.to(device), part.zero.to(device)) for width, part in self.parts.items()}
        return CodedWeight(self.codes.to(device), parts)

    def with_high_step(self, bit_width: int) -> "CodedWeight":
        """With the 4-bit float part that a code of one width above 4 bits needs: its scale is that width's, shifted."""
        part = self.parts[bit_width]
        high = FloatPart(part.scale * (1 << (bit_width - layout.NIBBLE_BITS)), part.zero)
        return CodedWeight(self.codes, {**self.parts, layout.NIBBLE_BITS: high})

    def stored(self, dtype: torch.dtype) -> "CodedWeight":
        """The same with float parts as `dtype` can hold them."""
        parts = {
            width: FloatPart(part.scale.to(dtype).float(), part.zero.to(dtype).float())
            for width, part in self.parts.items()
        }
        return CodedWeight(self.codes, parts)


def to_nested(coded: CodedWeight, bit_widths: Iterable[int], group_size: int, dtype: torch.dtype) -> NestedWeight:
    """The weight in the checkpoint's canonical order, on the CPU; float parts shared by wider groups are repeated."""
    rows, in_features = coded.codes.shape
    nested = NestedWeight.allocate(rows, in_features, group_size, bit_widths, dtype)
    packed = layout.pack(coded.codes.cpu())
    for name, chunk in nested.chunks.items():
        chunk.copy_(packed[name])
    for width, affine in nested.affine.items():
        for stored, solved in ((affine.scale, coded.parts[width].scale), (affine.zero, coded.parts[width].zero)):
            stored.zero_()
            stored[:, :rows] = solved.cpu().repeat_interleave(stored.shape[0] // solved.shape[1], dim=1).T
    return nested
