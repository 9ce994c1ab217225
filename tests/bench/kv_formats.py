"""Error of KV formats on a model's real keys and values, at their exact bits.

    python tests/bench/kv_formats.py --calibration FILE --text FILE --json OUT [--source demo|DIR|GGUF]

Keys after rotation by position, and values, of --sequences x --context tokens of the text, in pages of 64, from the float
model. `k`, `v`: mean squared error over mean variance of a channel. `logits`: variance of q·e/sqrt(head_dim), in nats²,
over the queries of the second half. `output`: squared error of attention's output over its square, where the first 16 tokens
and a query's own page are exact. Balance weights come from --calibration. Last comes the published QET beside product
quantization, on one layer's whole matrices, over budgets and groups.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kv_rivals import BlockCodec, GroupCodec, gaussian_table
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.evaluate.text import read_text
from anybit.engine.layers.rotary import RotaryEmbedding
from anybit.engine.machine import describe_device, resolve_device
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.calibrate.block import Block, load_linears, load_vectors
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.weights.source import SourceModel
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.codec.balance import PageBasis, balance_weights
from anybit.kvcache.codec.pages import CoarseCodec, PageCodec, PairCodec, UniformCodec, stored_bits
from anybit.kvcache.codec.qet_matrix import QetOptions, compress, product_quantization
from anybit.kvcache.codec.universal import tree_table, universal_table

EXACT_TOKENS = 16


@dataclass(frozen=True)
class Format:
    """Codecs of keys and values, and the basis in which pages are kept."""

    keys: PageCodec
    values: PageCodec
    is_rotated: bool = False
    is_balanced: bool = False


def formats() -> dict[str, Format]:
    def pairs(table: Any, **basis: bool) -> Format:
        return Format(PairCodec(table, has_mean=True), PairCodec(table, has_mean=False), is_rotated=True, **basis)

    found = {}
    for bits in (4, 3, 2):
        found[f"qet{bits}"] = pairs(universal_table(2 * bits), is_balanced=True)
        found[f"qet{bits}, no balance"] = pairs(universal_table(2 * bits))
        found[f"uniform {bits}"] = Format(UniformCodec(bits, "channel"), UniformCodec(bits, "token"))
        found[f"KIVI {bits}, groups of 32"] = Format(GroupCodec(bits, "tokens"), GroupCodec(bits, "channels"))
        found[f"k-means of pairs, no reorder, {bits}"] = pairs(gaussian_table(2, 2 * bits), is_balanced=True)
        found[f"rotation + Lloyd-Max {bits}"] = pairs(gaussian_table(1, bits), is_balanced=True)
    tree = tree_table()
    found["qet2+2"] = pairs(tree, is_balanced=True)
    found["qet2+2 read at 2"] = Format(CoarseCodec(tree, True), CoarseCodec(tree, False), True, True)
    found["uniform 8"] = Format(UniformCodec(8, "channel"), UniformCodec(8, "token"))
    found["q4_0"] = Format(BlockCodec(), BlockCodec())
    found["q4_0 + Hadamard"] = Format(BlockCodec(), BlockCodec(), is_rotated=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--source", default="demo")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", help="of the sweep of published QET, by commas", default="4,20")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    source = fetch_source(arguments.source)
    tokenizer = tokenizer_of(source)
    with torch.no_grad():
        balances = [
            balance_weights(layer.queries, layer.keys)
            for layer in attention_inputs(source, token_windows(tokenizer, arguments.calibration, arguments), device)
        ]
        compared = formats()
        sums: dict[str, Sums] = {name: Sums() for name in compared}
        sweep: list[dict[str, Any]] = []
        swept = {int(layer) for layer in arguments.layers.split(",")}
        windows = token_windows(tokenizer, arguments.text, arguments)
        for index, layer in enumerate(attention_inputs(source, windows, device)):
            for name, used in compared.items():
                sums[name].add(measure(layer, used, balances[index]))
            if index in swept:
                sweep += published(index, layer)
            print(f"layer {index}", flush=True)
    report = {
        "source": source.name,
        "text": arguments.text.name,
        "tokens": windows.numel(),
        "device": describe_device(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "formats": {name: found.means() for name, found in sums.items()},
        "published_qet": sweep,
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in report["formats"].items():
        print(f"{name:36}", *(f"{column} {value:.5f}" for column, value in row.items()))
    for row in sweep:
        print(row)


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's queries, keys and values as attention sees them: float32 [sequences, heads, tokens, head_dim]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float


def token_windows(tokenizer: Tokenizer, text: Path, arguments: argparse.Namespace) -> Tensor:
    """int64 [sequences, context]: the beginning of a text."""
    count = arguments.sequences * arguments.context
    ids = tokenizer.encode(read_text(text)[: 16 * count], add_special_tokens=False).ids
    return torch.tensor(ids[:count]).view(arguments.sequences, arguments.context)


def tokenizer_of(source: SourceModel) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        return Tokenizer.from_file(f"{directory}/tokenizer.json")


def attention_inputs(source: SourceModel, windows: Tensor, device: torch.device) -> Iterator[AttentionInputs]:
    """Of every layer of the float model in turn; windows int64 [sequences, tokens]."""
    config = parse_config(source.config)
    table = source.tensor("model.embed_tokens.weight").to(device, torch.float32)
    hidden = F.embedding(windows.to(device), table) * config.embedding_scale
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


def measure(layer: AttentionInputs, used: Format, weights: Tensor) -> dict[str, float]:
    """Errors and bits of one layer under one format."""
    basis = PageBasis(layer.keys.shape[-1], weights if used.is_balanced else None)
    keys, key_bits = through(layer.keys, used.keys, basis.keys if used.is_rotated else None, basis.restored_keys)
    values, value_bits = through(
        layer.values, used.values, basis.values if used.is_rotated else None, basis.restored_values
    )
    sequences, kv_heads, tokens, head_dim = keys.shape
    queries = layer.queries[:, :, tokens // 2 :].reshape(sequences, kv_heads, -1, head_dim)
    noise = queries @ (keys - layer.keys).transpose(-1, -2) * layer.scale
    return {
        "k_bits": key_bits,
        "v_bits": value_bits,
        "k": relative_error(keys, layer.keys),
        "v": relative_error(values, layer.values),
        "logits": float(noise[..., PAGE_TOKENS : tokens // 2].var(-1).mean()),
        "output": output_error(layer, keys, values),
    }


def through(
    rows: Tensor, codec: PageCodec, into: Callable[[Tensor], Tensor] | None, back: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """What is read back of rows [sequences, kv_heads, tokens, head_dim], and bits an element."""
    kept = rows if into is None else into(rows)
    pages = kept.unflatten(2, (-1, PAGE_TOKENS))
    fields = codec.encode(pages)
    decoded = codec.decode(fields).flatten(2, 3)
    return (decoded if into is None else back(decoded)), stored_bits(fields, rows.numel())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Without the first page, whose few huge elements would decide."""
    found, wanted = found[:, :, PAGE_TOKENS:], wanted[:, :, PAGE_TOKENS:]
    return float((found - wanted).square().mean() / wanted.var(2).mean())


def output_error(layer: AttentionInputs, keys: Tensor, values: Tensor) -> float:
    tokens = keys.shape[2]
    positions = torch.arange(tokens, device=keys.device)
    is_exact = positions < EXACT_TOKENS
    queries = positions[tokens // 2 :]
    own_page = positions[None] // PAGE_TOKENS == queries[:, None] // PAGE_TOKENS
    hidden = positions[None] > queries[:, None]
    repeat = layer.queries.shape[1] // keys.shape[1]
    q = layer.queries[:, :, tokens // 2 :]

    def attend(old_keys: Tensor, old_values: Tensor) -> Tensor:
        old_keys, old_values = (
            torch.where(is_exact[:, None], exact, old).repeat_interleave(repeat, 1)
            for exact, old in ((layer.keys, old_keys), (layer.values, old_values))
        )
        new_keys, new_values = (rows.repeat_interleave(repeat, 1) for rows in (layer.keys, layer.values))
        scores = torch.where(own_page, q @ new_keys.transpose(-1, -2), q @ old_keys.transpose(-1, -2)) * layer.scale
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        return (weights * own_page) @ new_values + (weights * ~own_page) @ old_values

    wanted = attend(layer.keys, layer.values)
    return float((attend(keys, values) - wanted).square().sum() / wanted.square().sum())


class Sums:
    """Means over layers, and the worst layer's errors."""

    def __init__(self) -> None:
        self._rows: list[Mapping[str, float]] = []

    def add(self, row: Mapping[str, float]) -> None:
        self._rows.append(row)

    def means(self) -> dict[str, float]:
        names = self._rows[0]
        means = {name: sum(row[name] for row in self._rows) / len(self._rows) for name in names}
        return means | {
            f"worst {name}": max(row[name] for row in self._rows) for name in ("k", "v", "logits", "output")
        }


def published(index: int, layer: AttentionInputs) -> list[dict[str, Any]]:
    """QET as published beside product quantization in float32, all heads of one layer side by side."""
    rows = []
    for kind, heads in (("k", layer.keys), ("v", layer.values)):
        matrix = heads.transpose(1, 2).flatten(2).flatten(0, 1)[:2048]
        variance = float(matrix.var(0).mean())
        for budget in (2, 3, 4, 6, 8):
            for groups in (4, 8, 32):
                errors = {}
                for name, options in (("qet", QetOptions(groups)), ("pq", product_quantization(groups))):
                    try:
                        found = compress(matrix, budget, options, torch.Generator().manual_seed(0))
                    except ValueError:
                        continue
                    errors[name] = float((found.decode() - matrix).square().mean()) / variance
                share = errors["qet"] / errors["pq"] if len(errors) == 2 else None
                rows.append({"layer": index, "of": kind, "budget": budget, "groups": groups, **errors, "share": share})
    return rows


if __name__ == "__main__":
    main()
