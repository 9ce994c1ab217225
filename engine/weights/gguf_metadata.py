"""The key-value part of a GGUF file."""

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from anybit.engine.errors import SourceError


class GGUFMetadata:
    """Entries of a GGUF file by key; "{arch}" in a key stands for the file's architecture."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader = reader
        self.path = path
        self.architecture = str(self.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key if "{" not in key else key.format(arch=self.architecture))
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        """SourceError if the file lacks the entry."""
        value = self.get(key)
        if value is None:
            raise SourceError(f"The metadata of {self.path} lack the entry {key.format(arch=self.architecture)}.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Some files give one per layer; those must be equal."""
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            name = key.format(arch=self.architecture)
            raise SourceError(f"The entry {name} in {self.path} is not one positive whole number.")
        return value
