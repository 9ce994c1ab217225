"""The integer step of the solvers, natively; `kernels.portable.choose_codes` says what it computes."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anybit.kernels.cpu.bindings import NUM_WIDTHS, native_library

_MAX_CODES = 256
_MAX_COLUMNS = 128
_COLUMN_MULTIPLE = 16


class CodeBlock(ctypes.Structure):
    """`CodeBlock` of native/nested.h."""

    _fields_ = [
        ("num_widths", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("num_codes", ctypes.c_int64),
        ("shifts", ctypes.c_int64 * NUM_WIDTHS),
        ("origin", ctypes.c_void_p),
        ("coupling", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


def can_choose_codes(targets: Tensor, num_codes: int) -> bool:
    """Whether the native kernels are there and have room for a block of this size."""
    return (
        targets.device.type == "cpu"
        and targets.shape[0] <= NUM_WIDTHS
        and targets.shape[2] <= _MAX_COLUMNS
        and targets.shape[2] % _COLUMN_MULTIPLE == 0
        and num_codes <= _MAX_CODES
        and native_library() is not None
    )


def choose_codes(
    targets: Tensor,
    origin: Tensor | None,
    coupling: Tensor,
    weights: Tensor,
    scale: Tensor,
    zero: Tensor,
    shifts: Sequence[int],
    num_codes: int,
) -> tuple[Tensor, Tensor]:
    native = native_library()
    if native is None:
        raise RuntimeError("The native CPU kernels were not built.")
    num_widths, rows, columns = targets.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    working, values = targets.contiguous(), torch.empty(targets.shape)
    above = torch.triu(coupling, 1)
    inputs = [tensor.to(torch.float32).contiguous() for tensor in (above, weights, scale, zero)]
    held_origin = None if origin is None else origin.contiguous()
    block = CodeBlock(num_widths, rows, columns, num_codes)
    block.shifts[:num_widths] = shifts
    block.origin = None if held_origin is None else held_origin.data_ptr()
    block.coupling, block.weights, block.scale, block.zero = (tensor.data_ptr() for tensor in inputs)
    block.targets, block.codes, block.values = working.data_ptr(), codes.data_ptr(), values.data_ptr()
    native.anybit_choose_codes(ctypes.byref(block))
    if working is not targets:
        targets.copy_(working)
    return codes, values
