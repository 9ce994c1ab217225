"""The compiled kernels: found if pip could build them, declared for Python. The other side is `native/api.cpp`."""

import ctypes
import functools
import importlib.util
import logging
import os
from pathlib import Path

logger = logging.getLogger("anybit.kernels")

VARIABLE = "ANYBIT_CPU_KERNELS"
MODULE_NAME = "anybit.kernels.cpu._native"
NUM_CHUNKS = 5
NUM_WIDTHS = 5


class FloatPart(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p)]


class Weight(ctypes.Structure):
    """`Weight` of native/nested.h: sizes and addresses; whoever makes one keeps the memory alive."""

    _fields_ = [
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("float_bytes", ctypes.c_int64),
        ("chunks", ctypes.c_void_p * NUM_CHUNKS),
        ("parts", FloatPart * NUM_WIDTHS),
    ]


class Segment(ctypes.Structure):
    _fields_ = [("bit_width", ctypes.c_int64), ("first", ctypes.c_int64), ("last", ctypes.c_int64)]


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The shared library, or None where it was not built; that is logged once, with what to do about it.

    ANYBIT_CPU_KERNELS says otherwise: "none" leaves the library unused, the name of an instruction set takes that one.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "none":
        return None
    spec = importlib.util.find_spec(MODULE_NAME)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        logger.warning(
            "The native CPU kernels were not built, so CPU inference is slower; install a C++ compiler and AnyBit again."
        )
        return None
    native = ctypes.CDLL(spec.origin)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "anybit_available": (ctypes.c_char_p, [ctypes.c_int]),
        "anybit_selected": (ctypes.c_char_p, []),
        "anybit_select": (ctypes.c_int, [ctypes.c_char_p]),
        "anybit_get_threads": (ctypes.c_int, []),
        "anybit_set_threads": (None, [ctypes.c_int]),
        "anybit_pack_chunk": (None, [pointer, integer, integer, ctypes.c_int, integer, pointer]),
        "anybit_pack_part": (None, [pointer, integer, integer, integer, integer, pointer]),
        "anybit_linear": (None, [pointer, pointer, integer, pointer, integer, pointer, pointer]),
        "anybit_stack": (None, [pointer, pointer, pointer, pointer]),
        "anybit_seal": (None, [pointer, pointer, pointer]),
        "anybit_embedding": (None, [pointer, integer, pointer, integer, pointer]),
        "anybit_rms_norm": (None, [pointer, pointer, integer, integer, ctypes.c_float, pointer]),
        "anybit_greedy": (None, [pointer, integer, integer, pointer]),
        "anybit_choose_codes": (None, [pointer]),
        "anybit_read": (ctypes.c_uint64, [pointer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    if wanted != "auto" and native.anybit_select(wanted.encode()) != 0:
        logger.warning("%s asks for %r, which does not run here; the best instruction set is used.", VARIABLE, wanted)
    return native


def is_native() -> bool:
    """Whether the compiled kernels are used."""
    return native_library() is not None


def instruction_sets() -> list[str]:
    """What this processor can run, the best first; empty without the native library."""
    native = native_library()
    names: list[str] = []
    while native is not None and (name := native.anybit_available(len(names))) is not None:
        names.append(name.decode())
    return names


def selected_instruction_set() -> str | None:
    native = native_library()
    return None if native is None else native.anybit_selected().decode()


def select_instruction_set(name: str) -> None:
    """Use another than the best one, as tests do; ValueError unless it is among `instruction_sets()`."""
    native = native_library()
    if native is None or native.anybit_select(name.encode()) != 0:
        raise ValueError(f"The instruction set {name!r} does not run here.")


def get_threads() -> int | None:
    native = native_library()
    return None if native is None else int(native.anybit_get_threads())


def set_threads(count: int) -> None:
    """How many threads take part in every native operation, the caller's included."""
    native = native_library()
    if native is not None:
        native.anybit_set_threads(count)
