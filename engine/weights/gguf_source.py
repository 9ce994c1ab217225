"""GGUF files as source models: names, row order and number formats translated to Hugging Face's."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from anybit.engine.errors import AnyBitError, SourceError, UnsupportedModelError
from anybit.engine.weights.gguf_config import config_from_metadata
from anybit.engine.weights.gguf_metadata import GGUFMetadata
from anybit.engine.weights.gguf_names import ROPE_DIVISORS, find_architecture, hugging_face_name
from anybit.engine.weights.gguf_tokenizer import write_tokenizer
from anybit.engine.weights.manifest import file_sha256
from anybit.engine.weights.source import first_sentence

_EMBEDDING = "model.embed_tokens.weight"


class GGUFSource:
    """One .gguf file; tensors are dequantized to float32 when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        try:
            reader = GGUFReader(path)
            self._metadata = GGUFMetadata(reader, self._path)
            self._architecture = find_architecture(self._metadata.architecture)
            stored = {tensor.name: tensor for tensor in reader.tensors}
            self._rope_divisors = stored.pop(ROPE_DIVISORS, None)
            self._tensors = {hugging_face_name(name, self._architecture): stored[name] for name in stored}
        except UnsupportedModelError:
            raise
        except Exception as error:  # the parser meets a broken file with whatever it stumbles over
            raise SourceError(f"{path} is not a complete GGUF file: {first_sentence(error)}.") from error

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def location(self) -> str:
        return str(self._path)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        embedding = self._stored(_EMBEDDING)
        divisors = None
        if self._rope_divisors is not None:
            divisors = self._dequantized(ROPE_DIVISORS, self._rope_divisors).tolist()
        vocab_size = int(embedding.shape[-1])  # a file lists dimensions from the innermost outwards
        try:
            return config_from_metadata(self._metadata, self._tensors, vocab_size, divisors)
        except AnyBitError:
            raise
        except Exception as error:  # entries may be of any type
            raise SourceError(f"The metadata of {self._path} cannot be used: {first_sentence(error)}.") from error

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        weight = self._dequantized(name, self._stored(name))
        projection = name.split(".")[-2]
        if self._architecture.permuted and projection in ("q_proj", "k_proj"):
            heads = "num_attention_heads" if projection == "q_proj" else "num_key_value_heads"
            return self._unpermuted(name, weight, self.config[heads])
        if projection.endswith("norm"):
            return weight - self._architecture.norm_offset
        return weight

    def write_tokenizer(self, directory: Path) -> None:
        write_tokenizer(self._metadata, directory)

    def sha256(self) -> str:
        return file_sha256(self._path)

    def _stored(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise SourceError(f"{self._path} lacks the tensor {name}.")
        return self._tensors[name]

    def _dequantized(self, name: str, stored: ReaderTensor) -> Tensor:
        try:
            array = dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:  # what the gguf library raises for a type it cannot decode
            raise SourceError(
                f"The tensor {name} of {self._path} cannot be decoded: {first_sentence(error)}."
            ) from error
        # Numbers that need no decoding are still those of the mapped file, which is read-only.
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _unpermuted(self, name: str, weight: Tensor, num_heads: int) -> Tensor:
        """Undo the row order that llama files give q and k (pairs interleaved) in favour of split halves."""
        rows = weight.shape[0]
        if rows % (2 * num_heads):
            raise SourceError(f"The tensor {name} of {self._path} has {rows} rows for {num_heads} heads.")
        pairs = weight.view(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)
