"""KL divergence from bf16 keys and values for formats that AnyBit does not serve, in the decoder that serves.

    python tests/bench/kv_divergence.py [MODEL] --text FILE --json OUT --formats "q4_0;q4_0 + Hadamard;KIVI 2, groups of 32"

The companion of `anybit bench kv`: same weights, text, windows and pages, in which these formats' codecs stand in for the
served ones. A query reads its own page and a sequence's first tokens (16, or what a page has room for) as they were written
and all else as codes, in every layer. `bf16 as codes` changes nothing: it shows what the arithmetic of this path does.
"""

import argparse
import json
from typing import Any

import torch
from kv_compared import PageFormat, page_formats
from kv_reference import Reference, add_options
from kv_rivals import ExactCodec

from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.models.config import DecoderConfig
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.formats import MAX_EXACT_TOKENS, TAIL_DTYPE, parse_format
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed import SealedPages
from anybit.kvcache.sealed_pool import SealedLayer, SealedPool
from anybit.kvcache.spec import KVSpec

REPLACED = "uniform4"
"""The served format whose pages make way for the compared ones."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--formats", required=True, help="of kv_compared.py, by semicolons")
    arguments = parser.parse_args()
    reference = Reference.open(arguments)
    formats = page_formats()
    compared = {name: formats[name] for name in arguments.formats.split(";")}
    variants = [variant_of(reference.variant, name, used, arguments.context) for name, used in compared.items()]
    reference.score(variants)
    report = {
        **reference.about(),
        "rows": [row_of(variant, compared.get(variant.kv_format)) for variant in (reference.variant, *variants)],
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
