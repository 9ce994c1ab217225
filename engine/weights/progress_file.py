"""How far the making of a checkpoint has come, in a small file beside it that any process may read; loads no torch."""

import contextlib
import os
import time
from pathlib import Path

import msgspec

_STALE_SECONDS = 600.0
"""A process that has not reported for so long is not trusted to be at work, even if its number still is in use."""


class PreparationProgress(msgspec.Struct, frozen=True):
    """`done` of `total` steps of `stage` as process `pid` reported them at the Unix time `updated`."""

    stage: str
    done: int
    total: int
    pid: int
    updated: float

    @property
    def share(self) -> float:
        """Of this stage, from 0 to 1."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else 0.0

    @property
    def percent(self) -> int:
        """`share` rounded down, so that 100 means done."""
        return int(100 * self.share)

    @property
    def is_current(self) -> bool:
        """Whether the process that reported this still lives and has not been silent for too long."""
        return time.time() - self.updated < _STALE_SECONDS and _is_alive(self.pid)


def report_progress(checkpoint: Path, stage: str, done: int, total: int) -> None:
    """Tell whoever asks how far this process has come with `checkpoint`; a disk that is full is no reason to fail."""
    path = _path(checkpoint)
    progress = PreparationProgress(stage, done, total, os.getpid(), time.time())
    scratch = path.with_name(f"{path.name}.{progress.pid}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(msgspec.json.encode(progress))
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_progress(checkpoint: Path) -> PreparationProgress | None:
    """What was last reported of `checkpoint`; None if nobody is making it now."""
    progress = _read(checkpoint)
    return progress if progress is not None and progress.is_current else None


def clear_progress(checkpoint: Path) -> None:
    """Remove the report once `checkpoint` is made or given up, unless it is another living process's."""
    progress = _read(checkpoint)
    if progress is None or progress.pid == os.getpid() or not progress.is_current:
        with contextlib.suppress(OSError):
            _path(checkpoint).unlink()


def _read(checkpoint: Path) -> PreparationProgress | None:
    try:
        return msgspec.json.decode(_path(checkpoint).read_bytes(), type=PreparationProgress)
    except (OSError, msgspec.DecodeError):
        return None


def _path(checkpoint: Path) -> Path:
    return checkpoint.parent / f".{checkpoint.name}.progress.json"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    return True
