"""CUDA C++ to machine code with NVRTC, which comes with PyTorch's CUDA packages: no toolkit has to be installed.

Compiled code is kept in a cache directory under a hash of all that went into it.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from anybit.kernels import fallbacks

SOURCES = Path(__file__).parent / "source"
CACHE_VARIABLE = "ANYBIT_KERNEL_CACHE"
_LIBRARY_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")

Defines = Mapping[str, int]


class CompilerMissingError(RuntimeError):
    """NVRTC or CUDA's headers are not installed."""


class CompileError(RuntimeError):
    """A source does not compile; the message is the compiler's log."""


def compile_source(name: str, architecture: str, defines: Defines) -> bytes:
    """The cubin of `source/<name>.cu` for an architecture such as "sm_90". CompilerMissingError, CompileError."""
    library, headers = _compiler()
    options = [
        f"--gpu-architecture={architecture}",
        "--std=c++17",
        f"--include-path={SOURCES}",
        f"--include-path={headers}",
        *(f"--define-macro={key}={value}" for key, value in sorted(defines.items())),
    ]
    encoded = [option.encode() for option in options]
    text = (SOURCES / f"{name}.cu").read_bytes()
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, f"{name}.cu".encode(), 0, None, None))
    try:
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        if library.nvrtcCompileProgram(program, len(encoded), array) != 0:
            raise CompileError(_output(library, program, "ProgramLog").decode(errors="replace").strip("\0\n"))
        return _output(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cached_cubin(name: str, architecture: str, defines: Defines) -> bytes:
    """`compile_source`, or what was compiled before from the same sources with the same options."""
    digest = hashlib.sha256(repr((name, architecture, sorted(defines.items()), _version())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    path = cache_directory() / f"{name}-{digest.hexdigest()[:24]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_source(name, architecture, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(path)
    except OSError as error:
        fallbacks.record("kernel_cache", f"{path.parent} cannot be written ({error.strerror}), so every start compiles")
    return cubin


def cache_directory() -> Path:
    """Where cubins are kept: $ANYBIT_KERNEL_CACHE, else below $XDG_CACHE_HOME or ~/.cache."""
    if CACHE_VARIABLE in os.environ:
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybit" / "kernels"


def can_compile() -> bool:
    try:
        _compiler()
    except CompilerMissingError:
        return False
    return True


@functools.cache
def _compiler() -> tuple[ctypes.CDLL, Path]:
    for folder in _toolkits():
        headers = folder / "include"
        for name in _LIBRARY_NAMES:
            for library in (folder / "lib" / name, folder / "lib64" / name):
                if library.is_file() and (headers / "cuda_fp16.h").is_file():
                    return ctypes.CDLL(str(library)), headers
    raise CompilerMissingError(
        "The CUDA kernels need NVRTC and CUDA's headers, which PyTorch's CUDA packages bring along; "
        "otherwise set CUDA_HOME to a CUDA toolkit."
    )


def _toolkits() -> Iterator[Path]:
    """Folders that may hold libraries and headers: those of NVIDIA's Python packages, then toolkits."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(location).glob("cu*"), reverse=True)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            yield Path(os.environ[variable])
    yield Path("/usr/local/cuda")


def _version() -> tuple[int, int]:
    library, _ = _compiler()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _output(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status != 0:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}.")
