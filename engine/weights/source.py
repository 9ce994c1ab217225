"""Source models: where unquantized weights, configuration and tokenizer come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from anybit.engine.errors import AnyBitError


class SourceModel(Protocol):
    """A float model under Hugging Face names, read one tensor at a time."""

    @property
    def name(self) -> str: ...

    @property
    def location(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        ...

    def tensor_names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor:
        """A float tensor; matrices are [out, in]."""
        ...

    def write_tokenizer(self, directory: Path) -> None:
        """Put tokenizer.json, its configuration, the chat template and generation_config.json there."""
        ...

    def sha256(self) -> str:
        """One hash over the files that hold the weights."""
        ...


def first_sentence(error: Exception) -> str:
    """The first sentence of a foreign error, without its final stop, to be quoted inside a sentence of ours."""
    if isinstance(error, AnyBitError):
        return str(error).rstrip(".")
    lines = str(error).strip().splitlines()
    return (lines[0].split(". ")[0] if lines else type(error).__name__).rstrip(".")
