"""The user's cache of prepared models: complete directories or none, whatever happens while one is made."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anybit.engine.errors import StorageError


def cache_root() -> Path:
    """$ANYBIT_CACHE_DIR, else `anybit` in $XDG_CACHE_HOME or ~/.cache."""
    explicit = os.environ.get("ANYBIT_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybit"


@contextmanager
def building(destination: Path) -> Iterator[Path]:
    """A fresh directory that becomes `destination` if the body succeeds and vanishes if it does not.

    One process at a time builds a destination; remains of builds that were killed are removed. StorageError tells of a
    full disk or a folder that cannot be written.
    """
    with storage_errors(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (destination.parent / f".{destination.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for remains in destination.parent.glob(f".{destination.name}.partial-*"):
                shutil.rmtree(remains, ignore_errors=True)
            partial = destination.parent / f".{destination.name}.partial-{uuid.uuid4().hex[:8]}"
            partial.mkdir()
            try:
                yield partial
                if destination.exists():
                    shutil.rmtree(destination)
                partial.rename(destination)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the system's storage errors into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk that holds {where} is full; free some space or set ANYBIT_CACHE_DIR."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise StorageError(
                f"{where} cannot be written ({error.strerror}); set ANYBIT_CACHE_DIR to a folder of yours."
            ) from error
        raise


def require_free_space(where: Path, num_bytes: int) -> None:
    """StorageError if the disk cannot hold `num_bytes` more."""
    existing = next(path for path in (where, *where.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise StorageError(
            f"{existing} has {free >> 20} MiB free but {num_bytes >> 20} MiB are needed; "
            "free some space or set ANYBIT_CACHE_DIR."
        )
