"""Queries, keys and values of a float model on a text, for scripts that compress them."""

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.evaluate.text import read_text
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.machine import describe_device
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.block import Block, load_linears, load_vectors
from anybit.engine.weights.source import SourceModel

_CHARACTERS_OF_TOKEN = 16  # no fewer tokens than one in so many


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """One layer's queries, keys and values as attention sees them: float32 [sequences, heads, tokens, head_dim]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default="demo", help="demo, a Hugging Face directory or a GGUF file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")


def describe_run(source: SourceModel, windows: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a report says of where its numbers come from."""
    return {
        "model": source.name,
        "text": arguments.text.name,
        "tokens": windows.numel(),
        "context": windows.shape[1],
        "machine": describe_machine(windows.device),
    }


def describe_machine(device: torch.device) -> str:
    return f"{platform.machine()}, {describe_device(device)}, torch {torch.__version__}"


def text_windows(source: SourceModel, text: Path, arguments: argparse.Namespace, device: torch.device) -> Tensor:
    """The beginning of a text: int64 [sequences, context]."""
    with tempfile.TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    count = arguments.sequences * arguments.context
    ids = tokenizer.encode(read_text(text)[: _CHARACTERS_OF_TOKEN * count], add_special_tokens=False).ids
    return torch.tensor(ids[:count], device=device).view(arguments.sequences, arguments.context)


def attention_inputs(source: SourceModel, windows: Tensor) -> Iterator[AttentionInputs]:
    """Of every layer of the float model in turn; windows int64 [sequences, tokens]."""
    device = windows.device
    config = parse_config(source.config)
    table = source.tensor("model.embed_tokens.weight").to(device, torch.float32)
    hidden = F.embedding(windows, table) * config.embedding_scale
    rotary = {
        layer.rope: RotaryEmbedding(layer.rope, config.head_dim, windows.shape[1], device) for layer in config.layers
    }
    for index in range(config.num_layers):
        block = Block(config, index, rotary[config.layers[index].rope])
        linears, vectors = load_linears(source, index, device), load_vectors(source, config, index, device)
        seen: dict[str, Tensor] = {}
        hidden = block(hidden, linears, vectors, seen.__setitem__)
        qkv = F.linear(seen["qkv"], linears["qkv"], vectors.get("qkv.bias"))
        yield AttentionInputs(*block.heads(qkv, vectors), config.attention_scale)
