"""Nested linear layers and embeddings on an NVIDIA GPU, through the tensor cores' integer instructions."""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels import layout
from anybit.kernels.cuda.compiler import can_compile
from anybit.kernels.cuda.driver import Argument, defined, load_kernel
from anybit.kernels.cuda.fragments import TILE_COLUMNS, FragmentWeight
from anybit.kernels.cuda.tuning import Tiling, choose_tiling
from anybit.kernels.nested import NestedWeight

ACTIVATION_ERROR = 1 / 32638
"""Largest error of an activation as a share of its group's largest magnitude."""
_TOKENS = 4  # of an n-tile
_MAX_TOKEN_TILES = 8  # of a pass
_VALUES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PARTS = {torch.float32: 0, torch.float16: 1}
_AMPERE = (8, 0)
_EMBEDDING_THREADS = 256


class _Weight(ctypes.Structure):
    """`Weight` of source/nested.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("c2", "c3", "c4", "c6", "c8", "high", "low")]


def can_pack(weight: NestedWeight) -> bool:
    """Whether the GPU's kernels can be built here and know this weight's number types."""
    part = next(iter(weight.affine.values())).scale
    return part.is_cuda and part.dtype in _PARTS and _is_supported(part.device)


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _AMPERE and can_compile()


@dataclass(frozen=True, slots=True)
class Activations:
    """Fixed point numbers of `tokens` rows in the order of B fragments (`source/activations.cu`)."""

    tokens: int
    digits: Tensor  # uint8 [n-tiles, column tiles, 1024]
    scales: Tensor  # float32 [groups, slots, 2]

    @property
    def slots(self) -> int:
        return self.scales.shape[1]


def num_token_tiles(tokens: int) -> int:
    """N-tiles that `tokens` tokens are padded to: 1, 2, 4 or whole passes."""
    needed = -(-tokens // _TOKENS)
    for count in (1, 2, 4):
        if needed <= count:
            return count
    return needed + -needed % _MAX_TOKEN_TILES


def quantize_activations(x: Tensor, group_size: int) -> Activations:
    """x [tokens, in], contiguous, as fixed point numbers; not-a-number for a group that is not finite."""
    tokens, columns = x.shape
    column_tiles = -(-columns // TILE_COLUMNS)
    token_tiles = num_token_tiles(tokens)
    digits = torch.empty(token_tiles, column_tiles, 8 * TILE_COLUMNS, dtype=torch.uint8, device=x.device)
    scales = torch.empty(column_tiles * (TILE_COLUMNS // group_size), token_tiles * _TOKENS, 2, device=x.device)
    activations = Activations(tokens, digits, scales)
    kernel = load_kernel("activations", "quantize_activations", defined(GROUP=group_size, VALUE=_VALUES[x.dtype]))
    arguments: list[Argument] = [*_pointers(x, digits, scales), *_integers(tokens, columns, activations.slots)]
    kernel.launch((column_tiles, token_tiles, 1), 128, arguments)
    return activations


def linear(
    x: Tensor, weight: FragmentWeight, segments: Sequence[tuple[int, int, int]], bias: Tensor | None = None
) -> Tensor:
    """x Ŵᵀ (+ bias), each segment (bit_width, start, stop) of rows at its width: [tokens, in] -> [tokens, out] in x's dtype.

    A row's result depends on that row and its width alone.
    """
    absent = [width for width, _, _ in segments if width not in weight.bit_widths]
    if absent:
        raise ValueError(f"The weight was not loaded at {absent[0]} bits.")
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    for width, start, stop in segments:
        if stop > start:
            multiply(quantize_activations(x[start:stop], weight.group_size), weight, width, bias, y[start:stop])
    return y


def multiply(
    activations: Activations,
    weight: FragmentWeight,
    bit_width: int,
    bias: Tensor | None,
    y: Tensor,
    tiling: Tiling | None = None,
) -> None:
    """Write the product at `bit_width` to y [tokens, out]; bias float32 [out]. `tiling` None takes the tuned one."""
    token_tiles = min(activations.digits.shape[0], _MAX_TOKEN_TILES)
    tiling = tiling or choose_tiling(weight.out_features, weight.in_features, bit_width, token_tiles)
    shared_bytes = tiling.shared_bytes(token_tiles)
    part_dtype = weight.parts[bit_width].dtype
    constants = product_constants(tiling, bit_width, weight.group_size, part_dtype, y.dtype, token_tiles)
    kernel = load_kernel("linear_decode", "nested_linear_decode", defined(**constants), shared_bytes)
    arguments: list[Argument] = [
        _describe(weight, bit_width),
        *_pointers(activations.digits, activations.scales, bias, y),
        *_integers(activations.tokens, activations.slots, weight.out_features, weight.row_tiles, weight.column_tiles),
    ]
    passes = activations.digits.shape[0] // token_tiles
    blocks = -(-weight.row_tiles // (tiling.row_warps * tiling.row_tiles))
    kernel.launch((tiling.cluster, passes, blocks), tiling.threads, arguments, shared_bytes)


def product_constants(
    tiling: Tiling, bit_width: int, group_size: int, part_dtype: torch.dtype, dtype: torch.dtype, token_tiles: int
) -> dict[str, int]:
    """What `source/linear_decode.cu` is compiled for."""
    return {
        **_constants(bit_width, group_size, part_dtype),
        "VALUE": _VALUES[dtype],
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "ROW_WARPS": tiling.row_warps,
        "COLUMN_WARPS": tiling.column_warps,
        "CLUSTER": tiling.cluster,
        "SEGMENTS": tiling.segments,
        "DEPTH": tiling.depth,
    }


def embedding(token_ids: Tensor, weight: FragmentWeight, bit_width: int) -> Tensor:
    """Rows of a packed table: int64 [tokens] -> float32 [tokens, in]; reads only those rows."""
    ids = token_ids.contiguous().view(-1)
    out = torch.empty(ids.numel(), weight.in_features, device=weight.device)
    if ids.numel():
        constants = _constants(bit_width, weight.group_size, weight.parts[bit_width].dtype)
        kernel = load_kernel("embedding", "nested_embedding", defined(**constants))
        arguments: list[Argument] = [
            _describe(weight, bit_width),
            *_pointers(ids, out),
            *_integers(weight.in_features, weight.column_tiles),
        ]
        kernel.launch((ids.numel(), 1, 1), _EMBEDDING_THREADS, arguments)
    return out


def _constants(bit_width: int, group_size: int, part_dtype: torch.dtype) -> dict[str, int]:
    return {"BITS": bit_width, "GROUP": group_size, "PART": _PARTS[part_dtype]}


def _describe(weight: FragmentWeight, bit_width: int) -> _Weight:
    pointers = {name: stream.data_ptr() for name, stream in weight.streams.items()}
    pointers["high"] = weight.parts[min(bit_width, layout.NIBBLE_BITS)].data_ptr()
    if bit_width > layout.NIBBLE_BITS:
        pointers["low"] = weight.parts[bit_width].data_ptr()
    return _Weight(**pointers)


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _integers(*values: int) -> list[ctypes.c_int]:
    return [ctypes.c_int(value) for value in values]
