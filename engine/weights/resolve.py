"""From what a user names to a checkpoint directory: which one it is, and whether it has been made already.

Imports no torch, so that a prepared model starts without waiting for it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anybit.engine.errors import SourceError
from anybit.engine.weights.cache import cache_root
from anybit.engine.weights.download import DEMO_NAME, DEMO_REPOSITORY
from anybit.engine.weights.manifest import FORMAT_VERSION, MANIFEST_NAME

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DEMO_SOURCES = ("wheel", "hub")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """`source` is what to quantize from: "demo", a hub repository, or a path; empty for a checkpoint as given."""

    name: str
    checkpoint: Path
    source: str

    @property
    def is_prepared(self) -> bool:
        return (self.checkpoint / MANIFEST_NAME).is_file()


def resolve_model(
    model: str | None, method: str, group_size: int | None, bit_widths: Sequence[int], demo_source: str = "wheel"
) -> ResolvedModel:
    """Find the checkpoint that serves `model` (None: the demo) with these options. SourceError if nothing is there."""
    options = f"{method}-g{group_size or 'auto'}-w{''.join(map(str, sorted(bit_widths)))}-v{FORMAT_VERSION}"
    if model is None:
        if demo_source == "hub":
            return ResolvedModel(DEMO_NAME, _cached(DEMO_NAME, f"hub/{DEMO_REPOSITORY}", options), DEMO_REPOSITORY)
        return ResolvedModel(DEMO_NAME, _cached(DEMO_NAME, "demo", options), "demo")
    path = Path(model).expanduser()
    if (path / MANIFEST_NAME).is_file():
        return ResolvedModel(path.resolve().name, path.resolve(), "")
    if path.exists():
        path = path.resolve()
        return ResolvedModel(
            path.stem if path.is_file() else path.name, _cached(path.stem, _fingerprint(path), options), str(path)
        )
    if is_repository(model):
        name = model.split("/")[1]
        return ResolvedModel(name, _cached(name, f"hub/{model}", options), model)
    raise SourceError(f"There is no model at {model}.")


def is_repository(model: str) -> bool:
    """Whether a name has the form of a hub repository, owner/name."""
    return _REPOSITORY.fullmatch(model) is not None


def _cached(name: str, identity: str, options: str) -> Path:
    digest = hashlib.sha256(f"{identity}\n{options}".encode()).hexdigest()[:12]
    return cache_root() / "checkpoints" / f"{name}-{options}-{digest}"


def _fingerprint(path: Path) -> str:
    """Where the files are, how large, and when they changed: enough to notice another model under the same path."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return f"{path}|" + "|".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
