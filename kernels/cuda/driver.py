"""The little of CUDA's driver that launching compiled kernels needs; PyTorch makes the context and the streams."""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.kernels.cuda.compiler import cached_cubin, can_compile

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED_BYTES = 48 << 10
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_AMPERE, _HOPPER = (8, 0), (9, 0)


Argument = ctypes.c_int | ctypes.c_float | ctypes.c_void_p | ctypes.Structure


class LaunchError(RuntimeError):
    """The driver refused a call."""


class _AttributeValue(ctypes.Union):
    _fields_ = [("size", ctypes.c_char * 64), ("flag", ctypes.c_int)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", _AttributeValue)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of a loaded module; modules stay loaded as long as the process."""

    function: ctypes.c_void_p | None  # None: it was only compiled
    overlaps: bool  # may begin before what precedes it in the stream has ended

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
        may_overlap: bool = True,
    ) -> None:
        """On PyTorch's current stream. Arguments are ctypes values in the order of the kernel's parameters.

        `may_overlap` False: it does not begin before what precedes it has ended, even if it could.
        """
        if self.function is None:
            return
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION)
        attribute.value.flag = 1
        config = _LaunchConfig(
            grid,
            (threads, 1, 1),
            shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            int(self.overlaps and may_overlap),
        )
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None))


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Whether kernels can be built here and run on this device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE and can_compile()


@functools.cache
def max_shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may ask for."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def load_kernel(source: str, function: str, defines: tuple[tuple[str, int], ...], shared_bytes: int = 0) -> Kernel:
    """A kernel of `source/<source>.cu` for the current device, compiled on first use."""
    if getattr(_this_thread, "only_compiles", False):
        return _compile(torch.cuda.current_device(), source, defines)
    return _load(torch.cuda.current_device(), source, function, defines, shared_bytes)


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """In this thread kernels are compiled, for the cache, and not launched: their tensors may be on the device "meta"."""
    _this_thread.only_compiles = True
    try:
        yield
    finally:
        _this_thread.only_compiles = False


_this_thread = threading.local()


@functools.cache
def _compile(device: int, source: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
    cached_cubin(source, architecture(torch.cuda.get_device_capability(device)), dict(defines))
    return Kernel(None, False)


@functools.cache
def _load(device: int, source: str, function: str, defines: tuple[tuple[str, int], ...], shared_bytes: int) -> Kernel:
    capability = torch.cuda.get_device_capability(device)
    cubin = cached_cubin(source, architecture(capability), dict(defines))
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin))
    _check(_driver().cuModuleGetFunction(ctypes.byref(handle), module, function.encode()))
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        _check(_driver().cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared_bytes))
    return Kernel(handle, capability >= _HOPPER)


def architecture(capability: tuple[int, int]) -> str:
    """The target to compile for; Hopper's warpgroup instructions are part of its own."""
    return f"sm_{capability[0]}{capability[1]}{'a' if capability == _HOPPER else ''}"


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether products of many rows can use wgmma."""
    return torch.cuda.get_device_capability(device) == _HOPPER


def defined(**constants: int) -> tuple[tuple[str, int], ...]:
    """Constants as `load_kernel` takes them."""
    return tuple(sorted(constants.items()))


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Arguments that are tensors; None is a null pointer."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def integers(*values: int) -> list[ctypes.c_int]:
    return [ctypes.c_int(value) for value in values]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status != 0:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise LaunchError(f"CUDA refused a kernel: {(name.value or b'unknown error').decode()}.")
