"""What the native CPU kernels' arithmetic costs: perplexity per width, beside the same codes dequantized to float32.

    python tests/bench/native_perplexity.py --text FILE --max-tokens 50176 --json native_perplexity_cpu.json

The reference path multiplies dequantized weights and unrounded activations in float32; embedding, KV format and text are
the same. KL is from the reference to the native path, in nats per token.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import builtin_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.layers.embedding import DenseVocabulary
from anybit.engine.layers.linear import DenseLinear
from anybit.engine.machine import keep_freed_memory, physical_cores
from anybit.engine.models.decoder import WeightLoader, build_decoder
from anybit.engine.models.registry import parse_config
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.engine.weights.resolve import resolve_model
from anybit.kernels import reference
from anybit.kernels.cpu.bindings import selected_instruction_set, set_threads
from anybit.kernels.nested import NestedWeight

WIDTHS = (2, 3, 4, 6, 8)
HEAD_BITS = 8


class DequantizedLoader:
    """One width of a checkpoint as float32 weights, by the oracle's definition."""

    def __init__(self, reader: CheckpointReader, bit_width: int) -> None:
        self._nested = NestedLoader(reader, (bit_width,), HEAD_BITS, native=False)
        self._bit_width = bit_width

    def linear(self, prefixes: Sequence[str], bias: bool) -> DenseLinear:
        linear = self._nested.linear(prefixes, bias)
        return DenseLinear(_dequantized(linear.weight, self._bit_width), linear.bias)

    def vocabulary(self, prefix: str) -> DenseVocabulary:
        return DenseVocabulary(_dequantized(self._nested.vocabulary(prefix).weight, HEAD_BITS))

    def vector(self, name: str) -> Tensor:
        return self._nested.vector(name)


def _dequantized(weight: object, bit_width: int) -> Tensor:
    if not isinstance(weight, NestedWeight):
        raise TypeError("The oracle reads weights in the canonical order only.")
    return reference.dequantize(weight, bit_width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--widths", default="2,3,4,6,8")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    resolved = resolve_model(None, "rtn", None, WIDTHS)
    if not resolved.is_prepared:
        raise SystemExit("Run `anybit inspect` first; it prepares the demo model.")
    if selected_instruction_set() is None:
        raise SystemExit("The native CPU kernels are not used here.")
    keep_freed_memory()
    threads = options.threads or physical_cores()
    set_threads(threads)
    torch.set_num_threads(threads)
    reader = CheckpointReader(resolved.checkpoint)
    config = parse_config(json.loads((resolved.checkpoint / "config.json").read_text()))
    tokenizer = Tokenizer.from_file(str(resolved.checkpoint / "tokenizer.json"))
    text = builtin_text() if options.text is None else options.text.read_text()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    token_windows = windows(token_ids, options.context, options.max_tokens)

    def variant(label: str, loader: WeightLoader, width: int) -> Variant:
        return Variant(label, build_decoder(config, loader, options.context), width, "bf16", 0.0)

    rows = []
    for width in map(int, options.widths.split(",")):
        expected = variant("reference", DequantizedLoader(reader, width), width)
        native = variant("native", NestedLoader(reader, (width,), HEAD_BITS), width)
        score_windows([native], token_windows, expected)
        rows.append(
            {
                "bit_width": width,
                "reference_perplexity": expected.perplexity,
                "native_perplexity": native.perplexity,
                "difference": native.perplexity / expected.perplexity - 1,
                "kl": native.kl / native.tokens,
                "top1_agreement": native.agreements / native.tokens,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        report = {
            "model": resolved.name,
            "text": "built-in" if options.text is None else options.text.name,
            "tokens": native.tokens,
            "context": options.context,
            "machine": f"{platform.machine()}, {selected_instruction_set()}, torch {torch.__version__}",
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
