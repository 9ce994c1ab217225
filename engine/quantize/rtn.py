"""Round to nearest: a nested code and its float parts from the weights alone, in closed form.

The high nibble is the 4-bit min-max code of each group, truncated; each width up to 4 bits gets the scale and zero
that fit its own levels to the weights by least squares. The low nibble is the 4-bit min-max code of what the 4-bit
scale leaves over, again with a fit per width. Later solvers choose better codes for the same format.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.nested import Affine, NestedWeight

_BLOCK_WEIGHTS = 1 << 22  # rows are solved in blocks of about this many weights, to bound memory
_LEVELS = 1 << layout.NIBBLE_BITS


def quantize_rtn(weight: Tensor, group_size: int, bit_widths: Sequence[int]) -> NestedWeight:
    """The nested code of a float weight [out, in] for `bit_widths`, on the CPU.

    ValueError if `group_size` does not divide `in` or a weight is not finite.
    """
    out_features, in_features = weight.shape
    if in_features % group_size:
        raise ValueError(f"The group size {group_size} does not divide the input size {in_features}.")
    float_dtype = float_part_dtype(weight)
    nested = NestedWeight.allocate(out_features, in_features, group_size, bit_widths, float_dtype)
    block_rows = max(layout.ROW_BLOCK, _BLOCK_WEIGHTS // in_features // layout.ROW_BLOCK * layout.ROW_BLOCK)
    for start in range(0, out_features, block_rows):
        stop = min(start + block_rows, out_features)
        _solve_rows(weight[start:stop].to(torch.float32), nested.rows(start, stop))
    return nested


def float_part_dtype(weight: Tensor) -> torch.dtype:
    """float16 unless the weights' range is so large or so small that its 8-bit steps would not fit; then float32."""
    largest = float(weight.abs().max())
    if not largest < float("inf"):
        raise ValueError("A weight is not finite.")
    return torch.float16 if largest == 0 or 1e-2 <= largest <= 3e4 else torch.float32


def _solve_rows(weight: Tensor, into: NestedWeight) -> None:
    rows, padded = weight.shape[0], layout.padded_rows(weight.shape[0])
    groups = weight.view(rows, into.num_groups, into.group_size)
    hi = _min_max_code(groups)
    for width in (w for w in into.affine if w <= layout.NIBBLE_BITS):
        _fit(hi >> (layout.NIBBLE_BITS - width), groups, into.affine[width])
    codes = hi << layout.NIBBLE_BITS
    if any(width > layout.NIBBLE_BITS for width in into.affine):
        scale = into.affine[layout.NIBBLE_BITS].scale[:, :rows].T.to(torch.float32).unsqueeze(2)
        residual = groups - scale * hi
        lo = _min_max_code(residual)
        codes |= lo
        for width in (w for w in into.affine if w > layout.NIBBLE_BITS):
            _fit(lo >> (layout.CODE_BITS - width), residual, into.affine[width])
    packed = layout.pack(codes.view(rows, into.in_features))
    for name, chunk in into.chunks.items():
        chunk.copy_(packed[name])
    if padded > rows:
        for part in into.affine.values():
            part.scale[:, rows:], part.zero[:, rows:] = 0, 0


def _min_max_code(values: Tensor) -> Tensor:
    """The index, 0 .. 15, of the sixteenth of its group's range that each value lies in: uint8, shape of `values`."""
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)  # `aminmax` takes eight times as long
    step = (high - low) / _LEVELS
    step = torch.where(step > 0, step, 1.0)
    return ((values - low) / step).floor_().clamp_(0, _LEVELS - 1).to(torch.uint8)


def _fit(codes: Tensor, values: Tensor, into: Affine) -> None:
    """Store the scale and zero that minimise Σ (value − scale·code − zero)² per group, [rows, groups, group_size].

    The zero is solved for the scale as stored, so that rounding the scale costs nothing at the group's mean.
    """
    rows = values.shape[0]
    levels = codes.to(torch.float32)
    mean_level, mean_value = levels.mean(2), values.mean(2)
    centred = levels - mean_level.unsqueeze(2)
    variance = centred.square().sum(2)
    scale = (centred * values).sum(2) / torch.where(variance > 0, variance, 1.0)
    stored = scale.to(into.scale.dtype)
    into.scale[:, :rows] = stored.T
    into.zero[:, :rows] = (mean_value - stored.to(torch.float32) * mean_level).T.to(into.zero.dtype)
