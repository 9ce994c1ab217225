"""KL divergence from bf16 keys and values for formats that AnyBit does not serve, in the decoder that serves.

    python tests/bench/kv_divergence.py [MODEL] --text FILE --json OUT --formats "q4_0;q4_0 + Hadamard;KIVI 2, groups of 32"

The companion of `anybit bench kv`: same weights, text, windows and pages, in which these formats' codecs stand in for the
served ones. A query reads its own page and a sequence's first tokens (16, or what a page has room for) as they were written
and all else as codes, in every layer. `bf16 as codes` changes nothing: it shows what the arithmetic of this path does.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from kv_compared import PageFormat, page_formats
from kv_inputs import describe_machine
from kv_rivals import ExactCodec
from tokenizers import Tokenizer

from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.machine import keep_freed_memory, physical_cores, resolve_device, use_threads
from anybit.engine.models.config import DecoderConfig
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.resolve import resolve_model
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.formats import MAX_EXACT_TOKENS, TAIL_DTYPE, parse_format
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.sealed_pool import SealedLayer, SealedPool
from anybit.kvcache.spec import KVSpec

WIDTHS = (2, 3, 4, 6, 8)
REPLACED = "uniform4"
"""The served format whose pages make way for the compared ones."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="an AnyBit checkpoint; without it the demo model's")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--formats", required=True, help="of kv_compared.py, by semicolons")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--bit-width", type=int, default=8)
    arguments = parser.parse_args()
    device = resolve_device("cpu")
    use_threads(physical_cores(), device)
    keep_freed_memory()
    reader = CheckpointReader(resolve_model(arguments.model, "best", None, WIDTHS).checkpoint)
    tokenizer = Tokenizer.from_file(str(reader.directory / "tokenizer.json"))
    token_ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=False).ids
    (reference,) = Comparison(reader, arguments.context, 8, (OWN_FORMAT,), device).nested((arguments.bit_width,))
    formats = page_formats()
    compared = {name: formats[name] for name in arguments.formats.split(";")}
    variants = [reference, *(variant_of(reference, name, used, arguments.context) for name, used in compared.items())]
    token_windows = windows(token_ids, arguments.context, arguments.max_tokens)
    score_windows(variants, token_windows, reference, lambda done, total: print(f"{done} of {total}", flush=True))
    report = {
        "model": reader.manifest.source_name,
        "text": arguments.text.name,
        "tokens": reference.tokens,
        "context": arguments.context,
        "bit_width": arguments.bit_width,
        "machine": describe_machine(device),
        "rows": [row_of(variant, compared.get(variant.kv_format)) for variant in variants],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


class ComparedPages(SealedPages):
    """Pages of codecs that are not served, with as many exact first tokens as a page has room for."""

    def __init__(self, used: PageFormat, num_pages: int, spec: KVSpec) -> None:
        super().__init__(parse_format(REPLACED), num_pages, spec.num_kv_heads, spec.head_dim)
        self.codecs = used.keys, used.values
        self.keys, self.values = (
            torch.zeros(num_pages, spec.num_kv_heads, codec.layout(spec.head_dim).num_bytes, dtype=torch.uint8)
            for codec in self.codecs
        )
        room = min(self.keys.shape[2], self.values.shape[2]) // (spec.head_dim * TAIL_DTYPE.itemsize)
        self.exact_tokens = min(MAX_EXACT_TOKENS, room)


def variant_of(reference: Variant, name: str, used: PageFormat, num_tokens: int) -> Variant:
    if used.is_balanced:
        raise SystemExit(f"{name!r} needs balance weights of keys; it is in kv_formats.py alone.")
    pool = pool_of(name, used, reference.decoder.config, num_tokens)
    return Variant(reference.label, reference.decoder, reference.bit_width, name, reference.effective_bits, pool=pool)


def pool_of(name: str, used: PageFormat, config: DecoderConfig, num_tokens: int) -> KVPool:
    """A cache for one sequence whose sealed pages are of this format."""
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, REPLACED)
    sealed = SealedPool(spec, spec.pages_for(num_tokens))
    sealed.layers = tuple(
        SealedLayer(ComparedPages(used, sealed.num_pages, spec), used.basis(spec.head_dim, None))
        for _ in range(spec.num_layers)
    )
    return KVPool(spec.of_format(OWN_FORMAT), -(-num_tokens // PAGE_TOKENS), sealed={name: sealed})


def row_of(variant: Variant, used: PageFormat | None) -> dict[str, Any]:
    head_dim = variant.decoder.config.head_dim
    bits = [
        8 * codec.layout(head_dim).num_bytes / (PAGE_TOKENS * head_dim)
        for codec in ((ExactCodec(), ExactCodec()) if used is None else (used.keys, used.values))
    ]
    return {
        "kv_format": variant.kv_format,
        "key_bits": bits[0],
        "value_bits": bits[1],
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens,
        "top1_agreement": variant.agreements / variant.tokens,
    }


if __name__ == "__main__":
    main()
