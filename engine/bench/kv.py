"""What formats of keys and values cost in quality, and what they save, on a text read through the served kernels."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import BUILTIN_TEXT, builtin_text, read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.machine import describe_device, physical_cores, resolve_device, use_threads
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.kvcache.formats import parse_format
from anybit.kvcache.spec import PAGE_SIZE

CAPACITY_TOKENS = (8192, 32768)
"""Lengths of sequences for which capacity is reported."""


@dataclass(frozen=True, slots=True)
class KVBenchOptions:
    """`text` None is the text that ships with the package; weights are read at `bit_width`."""

    kv_formats: tuple[str, ...]
    text: Path | None = None
    context: int = 2048
    max_tokens: int = 16384
    bit_width: int = 8
    device: str = "auto"
    threads: int = 0


@torch.inference_mode()
def bench_kv(
    directory: Path, options: KVBenchOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The `bench kv` report: per format bits an element, capacity beside bf16, and the distance from the same weights with
    bf16 keys and values: KL divergence in nats a token, and how often the likeliest token is the same."""
    device = resolve_device(options.device)
    use_threads(options.threads or physical_cores(), device)
    reader = CheckpointReader(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = builtin_text() if options.text is None else read_text(options.text)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    names = tuple(dict.fromkeys((OWN_FORMAT, *options.kv_formats)))
    variants = Comparison(reader, options.context, 8, names, device).nested((options.bit_width,))
    score_windows(variants, windows(token_ids, options.context, options.max_tokens), variants[0], progress)
    return {
        "model": reader.manifest.source_name,
        "text": BUILTIN_TEXT if options.text is None else options.text.name,
        "tokens": variants[0].tokens,
        "context": options.context,
        "bit_width": options.bit_width,
        "machine": f"{platform.machine()}, {describe_device(device)}, torch {torch.__version__}",
        "rows": [_row(variant, CAPACITY_TOKENS) for variant in variants],
    }


def _row(variant: Variant, lengths: Sequence[int]) -> dict[str, Any]:
    head_dim = variant.decoder.config.head_dim
    kv_format, exact = parse_format(variant.kv_format), parse_format(OWN_FORMAT)
    key_bytes, value_bytes = kv_format.record_bytes(head_dim)
    return {
        "kv_format": variant.kv_format,
        "key_bits": 8 * key_bytes / (PAGE_SIZE * head_dim),
        "value_bits": 8 * value_bytes / (PAGE_SIZE * head_dim),
        "capacity": {
            str(length): exact.sequence_bytes(length, head_dim) / kv_format.sequence_bytes(length, head_dim)
            for length in lengths
        },
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens,
        "top1_agreement": variant.agreements / variant.tokens,
        "tokens_per_second": variant.tokens / variant.seconds,
    }
