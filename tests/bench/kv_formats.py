"""Error of KV formats on a model's real keys and values, at their exact bits.

    python tests/bench/kv_formats.py --calibration FILE --text FILE --json OUT [--source demo|DIR|GGUF]

Keys after rotation by position, and values, of --sequences x --context tokens of the text, in pages of 64, from the float
model. `k`, `v`: mean squared error over mean variance of a channel, without the first page. `logits`: variance of
q·e/sqrt(head_dim), in nats², over the queries of the second half. `output`: squared error of attention's output over its
square, where the first 16 tokens and a query's own page are exact. All are means over layers; `worst` is the worst layer's.
Balance weights come from --calibration. `qet-matrix` is QET as published, on the matrix of a layer's heads side by side
without first pages, with as many bits in all as qet of the same level.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from kv_compared import PageFormat, page_formats
from kv_inputs import AttentionInputs, add_options, attention_inputs, describe_run, text_windows
from torch import Tensor

from anybit.engine.machine import resolve_device
from anybit.engine.quantize.prepare import fetch_source
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.codec.balance import balance_weights
from anybit.kvcache.codec.pages import PageCodec, stored_bits
from anybit.kvcache.codec.qet_matrix import QetOptions, compress

EXACT_TOKENS = 16
MATRIX_GROUPS = {4: 32, 3: 32, 2: 8}
"""Groups of columns by bits: of narrow ones, which lose least, as many as the bits hold beside the swaps."""
ERRORS = ("k", "v", "logits", "output")


@dataclass(frozen=True, slots=True)
class ReadBack:
    """One layer's keys and values after a format, [sequences, kv_heads, tokens, head_dim], and their bits an element."""

    keys: Tensor
    values: Tensor
    key_bits: float
    value_bits: float


class ExactAttention:
    """The queries of a layer's second half and what they find in exact keys and values: the same beside every format."""

    def __init__(self, layer: AttentionInputs) -> None:
        self._layer = layer
        kv_heads, tokens = layer.keys.shape[1:3]
        queries = layer.queries[:, :, tokens // 2 :] * layer.scale
        self._queries = queries.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # those of a KV head after each other
        positions = torch.arange(tokens, device=queries.device)
        later = positions[tokens // 2 :, None].repeat(layer.queries.shape[1] // kv_heads, 1)
        self._hidden = positions > later
        self._is_exact = (positions < EXACT_TOKENS) | (positions // PAGE_TOKENS == later // PAGE_TOKENS)
        self._scores = self._queries @ layer.keys.transpose(-1, -2)
        self._output = self._attend(self._scores, layer.values)

    def logit_noise(self, keys: Tensor) -> float:
        """Over keys that all of the queries read from codes but the first page's."""
        old = slice(PAGE_TOKENS, keys.shape[2] // 2)
        noise = self._queries @ (keys[:, :, old] - self._layer.keys[:, :, old]).transpose(-1, -2)
        return float(noise.var(-1).mean())

    def output_error(self, keys: Tensor, values: Tensor) -> float:
        scores = torch.where(self._is_exact, self._scores, self._queries @ keys.transpose(-1, -2))
        error = self._attend(scores, values) - self._output
        return float(error.square().sum() / self._output.square().sum())

    def _attend(self, scores: Tensor, values: Tensor) -> Tensor:
        weights = torch.softmax(scores.masked_fill(self._hidden, -torch.inf), -1)
        return weights @ values + (weights * self._is_exact) @ (self._layer.values - values)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    add_options(parser)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    source = fetch_source(arguments.source)
    calibration = text_windows(source, arguments.calibration, arguments, device)
    weights = [balance_weights(layer.queries, layer.keys) for layer in attention_inputs(source, calibration)]
    windows = text_windows(source, arguments.text, arguments, device)
    compared = page_formats()
    measured: dict[str, list[dict[str, float]]] = {}
    for index, layer in enumerate(attention_inputs(source, windows)):
        exact = ExactAttention(layer)
        for name, found in read_back(layer, compared, weights[index]):
            measured.setdefault(name, []).append(errors(layer, exact, found))
        print(f"layer {index}", flush=True)
    report = {
        **describe_run(source, windows, arguments),
        "calibration": arguments.calibration.name,
        "formats": {name: over_layers(rows) for name, rows in measured.items()},
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def read_back(
    layer: AttentionInputs, compared: dict[str, PageFormat], weights: Tensor
) -> Iterator[tuple[str, ReadBack]]:
    """The layer under every format, by name."""
    bits: dict[str, tuple[float, float]] = {}
    for name, used in compared.items():
        found = through_pages(layer, used, weights)
        bits[name] = found.key_bits, found.value_bits
        yield name, found
    for level, groups in MATRIX_GROUPS.items():
        yield f"qet-matrix {level}, {groups} groups", through_matrix(layer, *bits[f"qet{level}"], groups)


def through_pages(layer: AttentionInputs, used: PageFormat, weights: Tensor) -> ReadBack:
    basis = used.basis(layer.keys.shape[-1], weights)
    keys, key_bits = coded(basis.keys(layer.keys), used.keys)
    values, value_bits = coded(basis.values(layer.values), used.values)
    return ReadBack(basis.restored_keys(keys), basis.restored_values(values), key_bits, value_bits)


def coded(rows: Tensor, codec: PageCodec) -> tuple[Tensor, float]:
    """What is read back of rows [sequences, kv_heads, tokens, head_dim], and bits an element."""
    fields = codec.encode(rows.unflatten(2, (-1, PAGE_TOKENS)))
    return codec.decode(fields).flatten(2, 3), stored_bits(fields, rows.numel())


def through_matrix(layer: AttentionInputs, key_bits: float, value_bits: float, groups: int) -> ReadBack:
    """QET as published."""
    parts = []
    for rows, budget in ((layer.keys, key_bits), (layer.values, value_bits)):
        matrix = rows[:, :, PAGE_TOKENS:].transpose(1, 2).flatten(2).flatten(0, 1)
        found = compress(matrix, budget, QetOptions(groups), torch.Generator().manual_seed(0))
        later = found.decode().view(len(rows), -1, rows.shape[1], rows.shape[3]).transpose(1, 2)
        parts.append(torch.cat((rows[:, :, :PAGE_TOKENS], later), dim=2))
    return ReadBack(parts[0], parts[1], key_bits, value_bits)


def errors(layer: AttentionInputs, exact: ExactAttention, found: ReadBack) -> dict[str, float]:
    return {
        "key_bits": found.key_bits,
        "value_bits": found.value_bits,
        "k": relative_error(found.keys, layer.keys),
        "v": relative_error(found.values, layer.values),
        "logits": exact.logit_noise(found.keys),
        "output": exact.output_error(found.keys, found.values),
    }


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Without the first page, whose few huge elements would decide."""
    found, wanted = found[:, :, PAGE_TOKENS:], wanted[:, :, PAGE_TOKENS:]
    return float((found - wanted).square().mean() / wanted.var(2).mean())


def over_layers(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {f"worst {name}": max(row[name] for row in rows) for name in ERRORS}


if __name__ == "__main__":
    main()
