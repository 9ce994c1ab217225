"""Float models to compare quantizers on: one rotated without changing its function, one with some weights replaced.

The demo model's linears are dequantized 4-bit codes, which a quantizer with the same grid would reproduce exactly. Rotated,
the same function has weights that lie on nobody's grid.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anybit.engine.errors import SourceError
from anybit.engine.models.registry import parse_config
from anybit.engine.weights.source import SourceModel

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
_NORM_BEFORE = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
_WRITE_TO_STREAM = ("o_proj", "down_proj")


def linear_names(source: SourceModel) -> list[str]:
    """The weights that quantizers change: every linear of every block, neither embedding nor head."""
    return [name for name in source.tensor_names() if name.endswith("_proj.weight")]


class RotatedSource:
    """Another source's function with its residual stream in another orthonormal basis, drawn from `seed`.

    Norms' gains move into the linears that follow, which needs a head of its own, so that the basis can pass each norm:
    with x Q for x, readers become W diag(g) Q and writers Qᵀ W. SourceError for families with norms after their blocks.
    """

    def __init__(self, source: SourceModel, seed: int = 0) -> None:
        decoder = parse_config(source.config)
        if decoder.output_norms:
            raise SourceError(f"{source.name} has norms after its blocks, through which no rotation passes.")
        self.config: Mapping[str, Any] = {**source.config, "tie_word_embeddings": False}
        self._source = source
        self._seed = seed
        self._norm_offset = decoder.norm_offset
        generator = torch.Generator().manual_seed(seed)
        size = decoder.hidden_size
        self._basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]

    @property
    def name(self) -> str:
        return f"{self._source.name}-rotated"

    @property
    def location(self) -> str:
        return self._source.location

    def tensor_names(self) -> list[str]:
        names = self._source.tensor_names()
        return names if HEAD in names else [*names, HEAD]

    def tensor(self, name: str) -> Tensor:
        if name == HEAD:
            tied = HEAD not in self._source.tensor_names()
            return self._reader(EMBEDDING if tied else HEAD, FINAL_NORM)
        weight = self._source.tensor(name)
        prefix, module, kind = name.rsplit(".", 2)
        if name == EMBEDDING:
            return torch.mm(weight.double(), self._basis).float()
        if name == FINAL_NORM or module in _NORM_BEFORE.values():
            return torch.full_like(weight, 1 - self._norm_offset)
        if module in _WRITE_TO_STREAM:
            return torch.matmul(self._basis.T, weight.double()).float()
        if module in _NORM_BEFORE and kind == "weight":
            block = prefix.rsplit(".", 1)[0]
            return self._reader(name, f"{block}.{_NORM_BEFORE[module]}.weight")
        return weight

    def write_tokenizer(self, directory: Path) -> None:
        self._source.write_tokenizer(directory)

    def sha256(self) -> str:
        return hashlib.sha256(f"{self._source.sha256()} rotated by {self._seed}".encode()).hexdigest()

    def _reader(self, name: str, norm: str) -> Tensor:
        gain = self._source.tensor(norm).double() + self._norm_offset
        return torch.mm(self._source.tensor(name).double() * gain, self._basis).float()


class ReplacedSource:
    """Another source with some of its tensors replaced, such as by what a quantizer made of them."""

    def __init__(self, source: SourceModel, replaced: Mapping[str, Tensor]) -> None:
        absent = sorted(set(replaced) - set(source.tensor_names()))
        if absent:
            raise SourceError(f"{source.name} has no tensor {absent[0]}.")
        self.config = source.config
        self._source = source
        self._replaced = replaced

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def location(self) -> str:
        return self._source.location

    def tensor_names(self) -> list[str]:
        return self._source.tensor_names()

    def tensor(self, name: str) -> Tensor:
        return self._replaced[name] if name in self._replaced else self._source.tensor(name)

    def write_tokenizer(self, directory: Path) -> None:
        self._source.write_tokenizer(directory)

    def sha256(self) -> str:
        digest = hashlib.sha256(self._source.sha256().encode())
        for name, tensor in sorted(self._replaced.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def write_hugging_face(source: SourceModel, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """The source as a directory that other tools load: config.json, one safetensors file and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    source.write_tokenizer(directory)
    config = {**source.config, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = {name: source.tensor(name).to(dtype).contiguous() for name in source.tensor_names()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
