"""Hugging Face directories as source models."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anybit.engine.errors import CheckpointError, SourceError
from anybit.engine.weights.checkpoint import INDEX_NAME, ShardReader
from anybit.engine.weights.manifest import file_sha256
from anybit.engine.weights.source import first_sentence

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class HuggingFaceSource:
    """A directory with config.json, safetensors (one file or shards with an index) and a tokenizer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        if not (directory / INDEX_NAME).is_file() and not (directory / "model.safetensors").is_file():
            if any(path.suffix in PICKLE_SUFFIXES for path in directory.iterdir()):
                raise SourceError(
                    f"{directory} holds only pickle weights, which can run code when loaded; convert them to safetensors."
                )
            raise SourceError(f"{directory} holds no safetensors weights.")
        self.config = _read_json(directory / "config.json")
        try:
            self._shards = ShardReader(directory)
        except CheckpointError as error:
            raise SourceError(str(error)) from error

    @property
    def name(self) -> str:
        return self._directory.name

    @property
    def location(self) -> str:
        return str(self._directory)

    def tensor_names(self) -> list[str]:
        return list(self._shards.names)

    def tensor(self, name: str) -> Tensor:
        try:
            return self._shards.tensor(name)
        except CheckpointError as error:
            raise SourceError(str(error)) from error

    def write_tokenizer(self, directory: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, directory / name)
        if not (directory / "tokenizer.json").is_file():
            _convert_slow_tokenizer(self._directory, directory)

    def sha256(self) -> str:
        return _combined_sha256(sorted(self._directory.glob("*.safetensors")))


def _convert_slow_tokenizer(source: Path, destination: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import, needed only here

    try:
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(destination)
    except Exception as error:
        raise SourceError(f"The tokenizer in {source} cannot be read: {first_sentence(error)}.") from error
    if not (destination / "tokenizer.json").is_file():
        raise SourceError(f"The tokenizer in {source} has no fast form (tokenizer.json).")


def _combined_sha256(paths: list[Path]) -> str:
    if len(paths) == 1:
        return file_sha256(paths[0])
    return hashlib.sha256("".join(file_sha256(path) for path in paths).encode()).hexdigest()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {first_sentence(error)}.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} does not hold a JSON object.")
    return content
