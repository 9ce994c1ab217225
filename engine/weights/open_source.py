"""Finds the right reader for a path to a model."""

from pathlib import Path

from anybit.engine.errors import SourceError
from anybit.engine.weights.gguf_source import GGUFSource
from anybit.engine.weights.huggingface_source import PICKLE_SUFFIXES, HuggingFaceSource
from anybit.engine.weights.source import SourceModel


def open_source(path: Path) -> SourceModel:
    """Open a Hugging Face directory or a GGUF file; SourceError says in a sentence what is wrong with anything else."""
    if not path.exists():
        raise SourceError(f"There is no model at {path}.")
    if path.suffix in PICKLE_SUFFIXES:
        raise SourceError(
            f"{path.name} is a pickle file, which can run code when loaded; convert it to safetensors first."
        )
    if path.is_dir():
        return HuggingFaceSource(path)
    if path.suffix == ".gguf":
        return GGUFSource(path)
    raise SourceError(f"{path} is neither a model directory nor a .gguf file.")
