"""Float models as GGUF files for llama.cpp's quantizer, and what it made of them as floats again.

Its formats of 256 weights do not fit rows of another length, for which it takes formats of 32 weights and more bits. A file
with `joined` rows has so many rows of such a weight after one another in each of its own that they fit: no model to run, but
what the formats do on weights like these.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from numpy.typing import NDArray
from quality_sources import EMBEDDING, HEAD, linear_names
from torch import Tensor

from anybit.engine.weights.gguf_names import Architecture, find_architecture, hugging_face_name
from anybit.engine.weights.source import SourceModel

_BLOCK = 256
_OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, slots=True)
class GGUFTemplate:
    """A file of the same model: its metadata, and the names that its tensors have among Hugging Face's."""

    path: Path
    architecture_name: str
    architecture: Architecture
    file_names: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> "GGUFTemplate":
        reader = GGUFReader(path)
        name = str(reader.fields["general.architecture"].contents())
        architecture = find_architecture(name)
        stored = [tensor.name for tensor in reader.tensors]
        file_names = {hugging_face_name(each, architecture): each for each in [*stored, "output.weight"]}
        return cls(path, name, architecture, file_names)


@dataclass(frozen=True, slots=True)
class QuantizedFile:
    """What a quantizer made, as floats; formats by kind of weight; bits per weight."""

    linears: dict[str, Tensor]
    vocabulary: dict[str, Tensor]
    formats: dict[str, dict[str, int]]
    linear_bits: float
    all_bits: float  # with embedding and head


def rows_to_join(columns: int) -> int:
    """How many rows of this length together are whole blocks of 256 weights."""
    return _BLOCK // math.gcd(columns, _BLOCK)


def write_gguf(template: GGUFTemplate, source: SourceModel, destination: Path, joined: bool) -> None:
    """The source's weights as a float32 file with the template's metadata."""
    writer = GGUFWriter(destination, template.architecture_name)
    for field in GGUFReader(template.path).fields.values():
        if field.name.startswith(_OWN_FIELDS):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    linears = set(linear_names(source))
    for name in source.tensor_names():
        weight = source.tensor(name).float()
        if heads := _permuted_heads(name, template, source):
            weight = _permute(weight, heads)
        if joined and name in linears:
            weight = weight.reshape(-1, weight.shape[1] * rows_to_join(weight.shape[1]))
        writer.add_tensor(template.file_names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_quantized(path: Path, template: GGUFTemplate, source: SourceModel) -> QuantizedFile:
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    formats: dict[str, Counter[str]] = defaultdict(Counter)

    def read(name: str) -> Tensor:
        tensor = stored[template.file_names[name]]
        formats[name.split(".")[-2]][tensor.tensor_type.name] += 1
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(source.tensor(name).shape)
        heads = _permuted_heads(name, template, source)
        return _unpermute(weight, heads) if heads else weight

    def bits(names: Iterable[str]) -> float:
        tensors = [stored[template.file_names[name]] for name in names]
        return 8 * sum(int(each.n_bytes) for each in tensors) / sum(int(each.n_elements) for each in tensors)

    linears = {name: read(name) for name in linear_names(source)}
    vocabulary = {name: read(name) for name in (EMBEDDING, HEAD) if name in source.tensor_names()}
    counts = {kind: dict(counter) for kind, counter in formats.items()}
    return QuantizedFile(linears, vocabulary, counts, bits(linears), bits(linears | vocabulary))


def importance_of_file(
    importance: dict[str, Tensor], template: GGUFTemplate, joined: bool
) -> dict[str, NDArray[np.float32]]:
    """Importances of columns by the names in the file, repeated for each row that is joined."""
    return {
        template.file_names[name]: columns.float().repeat(rows_to_join(len(columns)) if joined else 1).numpy()
        for name, columns in importance.items()
    }


def _permuted_heads(name: str, template: GGUFTemplate, source: SourceModel) -> int:
    """The heads whose rows such files have in the order of a rotation of neighbours; 0 for other weights."""
    entries = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    entry = entries.get(name.split(".")[-2]) if template.architecture.permuted else None
    return 0 if entry is None else int(source.config[entry])


def _permute(weight: Tensor, heads: int) -> Tensor:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)
