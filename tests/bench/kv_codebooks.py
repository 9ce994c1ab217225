"""Codebooks trained on a model's own keys and values beside the universal ones: errors, and KL divergence from bf16.

    python tests/bench/kv_codebooks.py [MODEL] --text FILE --calibration FILE --json OUT [--kv-format qet4,qet3,qet2]

Lloyd's algorithm goes on from the universal entries with what pages are coded from: keys and values in the pages' basis,
balanced as at a start of `anybit serve`, keys less their page's mean, over their size, without first pages: of all layers
(`per model`) or of each alone (`per layer`), keys and values apart. Calibrations have windows of their own. `universal, more
Gaussian` goes on with new Gaussian vectors; what that changes has nothing to do with the model. Errors are those of
kv_formats.py on the text's first window, KL is by window, through the served kernels.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kv_balance import estimated
from kv_compared import PageFormat, balanced
from kv_formats import ExactAttention, errors, over_layers, through_pages
from kv_inputs import AttentionInputs
from kv_reference import Reference, add_options
from kv_rivals import REFINING_ITERATIONS, ordered_pairs, refined
from torch import Tensor

from anybit.engine.evaluate.text import read_text
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.kv.prompt_heads import prompt_tokens, read_heads
from anybit.engine.quantize.calibrate.tokens import sample_windows
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.codec.universal import universal_table
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import SealedPool
from anybit.kvcache.spec import KVSpec

POINTS = 1 << 16

Points = tuple[Tensor, Tensor]
"""Ordered pairs of a layer's keys and of its values, [pairs, 2]."""


@dataclass(frozen=True, slots=True)
class Codebooks:
    """A format with tables of each layer's own, and the calibration that they are trained on."""

    kv_format: str
    name: str
    layers: Sequence[PageFormat]
    calibration: int | None = None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--calibrations", type=int, default=2)
    parser.add_argument("--kv-format", default="qet4,qet3,qet2")
    arguments = parser.parse_args()
    reference = Reference.open(arguments)
    exact, head_dim = reference.variant, reference.variant.decoder.config.head_dim
    at_start = prompt_tokens(reference.reader.directory, exact.decoder.config.max_position_embeddings)
    weights = estimated(exact.decoder, [at_start], exact.bit_width)
    points = [calibrated_points(reference, weights, seed) for seed in range(arguments.calibrations)]
    compared = [books for name in arguments.kv_format.split(",") for books in codebooks(name, points, head_dim)]
    windows = reference.windows()
    rows: list[dict[str, Any]] = [
        {"kv_format": books.kv_format, "codebooks": books.name, "calibration": books.calibration, **found}
        for books, found in zip(compared, read_back(exact, windows[0], compared, weights), strict=True)
    ]
    for window in windows:
        variants = [variant_of(exact, books, weights, arguments.context) for books in compared]
        reference.score(variants, [window])
        for row, variant in zip(rows, variants, strict=True):
            row.setdefault("kl", []).append(variant.kl / variant.tokens)
            row.setdefault("top1_agreement", []).append(variant.agreements / variant.tokens)
    about = {**reference.about(), "calibration": arguments.calibration.name}
    training = {"points": POINTS, "iterations": REFINING_ITERATIONS}
    arguments.json.write_text(json.dumps({**about, **training, "rows": rows}, indent=1) + "\n")


def calibrated_points(reference: Reference, weights: Sequence[Tensor], seed: int) -> list[Points]:
    """Of each layer, from two windows at random places of the calibration text."""
    options, generator = reference.options, torch.Generator().manual_seed(seed)
    windows = sample_windows(read_text(options.calibration), reference.encode, [], 2, options.context, seed).tolist()
    seen = [read_heads(reference.variant.decoder, window, reference.variant.bit_width) for window in windows]
    found = []
    for layer, of_layer in zip(zip(*seen, strict=True), weights, strict=True):
        basis = PageBasis(layer[0].keys.shape[-1], of_layer)
        keys, values = (
            torch.stack(rows)[:, :, PAGE_TOKENS:].unflatten(2, (-1, PAGE_TOKENS))
            for rows in zip(*((basis.keys(heads.keys), basis.values(heads.values)) for heads in layer), strict=True)
        )
        pairs = ordered_pairs(keys - keys.mean(-2, keepdim=True)), ordered_pairs(values)
        found.append((drawn(pairs[0], generator), drawn(pairs[1], generator)))
    return found


def drawn(points: Tensor, generator: torch.Generator) -> Tensor:
    return points[torch.randperm(len(points), generator=generator)[:POINTS]]


def codebooks(kv_format: str, calibrations: Sequence[Sequence[Points]], head_dim: int) -> Iterator[Codebooks]:
    universal = universal_table(2 * int(kv_format.removeprefix("qet")))
    num_layers, generator = len(calibrations[0]), torch.Generator().manual_seed(0)
    yield Codebooks(kv_format, "universal", [balanced(universal, universal)] * num_layers)
    gaussian = refined(universal, ordered_pairs(torch.randn(2 * POINTS // head_dim, head_dim, generator=generator)))
    yield Codebooks(kv_format, "universal, more Gaussian", [balanced(gaussian, gaussian)] * num_layers)
    for number, layers in enumerate(calibrations):
        together = (refined(universal, drawn(torch.cat(points), generator)) for points in zip(*layers, strict=True))
        yield Codebooks(kv_format, "per model", [balanced(*together)] * num_layers, number)
        alone = [balanced(refined(universal, keys), refined(universal, values)) for keys, values in layers]
        yield Codebooks(kv_format, "per layer", alone, number)


def read_back(
    reference: Variant, window: Sequence[int], compared: Sequence[Codebooks], weights: Sequence[Tensor]
) -> list[dict[str, float]]:
    """Errors of each of the codebooks over the layers."""
    measured: list[list[dict[str, float]]] = [[] for _ in compared]
    heads = read_heads(reference.decoder, window, reference.bit_width)
    for index, (layer, of_layer) in enumerate(zip(heads, weights, strict=True)):
        scale = reference.decoder.layers[index].attention.settings.scale
        inputs = AttentionInputs(layer.queries[None], layer.keys[None], layer.values[None], scale)
        exact = ExactAttention(inputs)
        for books, rows in zip(compared, measured, strict=True):
            rows.append(errors(inputs, exact, through_pages(inputs, books.layers[index], of_layer)))
        print(f"layer {index}", flush=True)
    return [over_layers(rows) for rows in measured]


def variant_of(reference: Variant, books: Codebooks, weights: Sequence[Tensor], num_tokens: int) -> Variant:
    """The reference with a cache for one sequence whose pages are of these codebooks."""
    config = reference.decoder.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, books.kv_format)
    sealed = SealedPool(spec, spec.pages_for(num_tokens), weights)
    for layer, used in zip(sealed.layers, books.layers, strict=True):
        layer.pages.codecs = used.keys, used.values
    pool = KVPool(spec.of_format(OWN_FORMAT), -(-num_tokens // PAGE_TOKENS), sealed={books.kv_format: sealed})
    label, bits = reference.label, reference.effective_bits
    return Variant(label, reference.decoder, reference.bit_width, books.kv_format, bits, pool=pool)


if __name__ == "__main__":
    main()
