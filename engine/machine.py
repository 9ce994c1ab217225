"""What the machine offers: cores, memory, devices."""

import ctypes
import functools
import os
from pathlib import Path

import torch

from anybit.engine.config import ConfigError
from anybit.engine.control_groups import ControlGroups
from anybit.kernels.cpu.bindings import get_threads, selected_instruction_set, set_threads

_KEPT_BYTES = 256 << 20
# Names of /proc/cpuinfo that decide which kernels a processor can run, of x86 and of ARM.
_KERNEL_FLAGS = (
    *("f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def physical_cores() -> int:
    """Physical cores' worth of time that this process may use; logical ones where the topology is unknown.

    More threads than a container may run at once would wait for one another while the system holds some of them back.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    quota = _control_groups().cpus()
    return max(1, len(siblings) if quota is None else min(len(siblings), int(quota)))


@functools.cache
def _control_groups() -> ControlGroups:
    return ControlGroups()


def cpu_flags() -> list[str]:
    """What the processor says it offers, as far as kernels may use it; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    offered: set[str] = set()
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            offered |= set(value.split())
    return [flag for flag in _KERNEL_FLAGS if flag in offered]


def use_threads(count: int, device: torch.device) -> None:
    """Compute with `count` threads.

    Where the native kernels do the work, PyTorch gets one: its idle threads would spin on the cores that those need.
    """
    native = device.type == "cpu" and selected_instruction_set() is not None
    torch.set_num_threads(1 if native else count)
    set_threads(count)


def keep_freed_memory() -> None:
    """Let the C allocator keep what a step frees for the next one; glibc only, elsewhere nothing happens.

    By default every larger temporary tensor is mapped and unmapped anew, and the kernel's zeroing of its pages costs as
    much as the arithmetic done on them.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, _KEPT_BYTES)
        mallopt(trim_threshold, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Give the system back what the C allocator has kept of freed memory; glibc only, elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU; ConfigError if CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("The device cuda was asked for, but PyTorch sees no GPU here.")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return (
        f"cpu ({get_threads() or torch.get_num_threads()} threads, {selected_instruction_set() or 'portable kernels'})"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device, by a container within its limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    left = _control_groups().memory_left()
    available = _available_memory()
    return available if left is None else min(left, available)


def _available_memory() -> int:
    """Of the whole machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def resident_bytes() -> int:
    """Resident set size of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
