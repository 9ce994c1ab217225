"""What a container may use of its machine: limits of control groups, as Docker and Kubernetes set them.

Both versions of Linux's interface are read (https://docs.kernel.org/admin-guide/, cgroup-v2.html and cgroup-v1/). A
process is bound by its own group and by all around it, as far as they can be seen from inside.
"""

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED_BYTES = 1 << 60  # version 1 says "none" by a number of pages that no machine has


class ControlGroups:
    """Those of this process that limit it, found once: what is left is asked for several times a second."""

    def __init__(self, mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> None:
        """The places are others in tests alone."""
        self._cpu = [group for group in _groups(mount, membership, "cpu") if _cpu_quota(group) is not None]
        self._memory = [group for group in _groups(mount, membership, "memory") if _memory_left(group) is not None]

    def cpus(self) -> float | None:
        """Processors' worth of time that may be used, such as 1.5; None where nothing limits it."""
        limits = [quota for group in self._cpu if (quota := _cpu_quota(group)) is not None]
        return min(limits, default=None)

    def memory_left(self) -> int | None:
        """Bytes that may still be taken, caches that the system would give up counted in; None where nothing limits it."""
        left = [rest for group in self._memory if (rest := _memory_left(group)) is not None]
        return min(left, default=None)


def _groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders that tell of a controller: the process's own group first, the outermost last."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root = mount
        elif controller in controllers.split(","):
            root = mount / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        if ".." in group.parts:  # outside of what this container sees
            group = Path()
        # Of version 1 the path may be the machine's, of which only the last part is mounted here, as the root.
        yield from (root / place for place in (group, *group.parents) if (root / place).is_dir())


def _cpu_quota(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not period:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit() and int(period)):  # "max", -1, or no such file
        return None
    return int(quota) / int(period)


def _memory_left(group: Path) -> int | None:
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(group / limit_name), _read(group / usage_name)
        if not (limit.isdigit() and usage.isdigit()) or int(limit) >= _UNLIMITED_BYTES:
            continue
        statistics = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
        return max(0, int(limit) - int(usage) + int(statistics.get(cache_name, 0)))
    return None


def _read(path: Path) -> str:
    """Empty where there is nothing to be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
