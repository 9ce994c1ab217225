"""What formats of keys and values cost in quality, and what they save, on a text read through the served kernels."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import BUILTIN_TEXT, builtin_text, read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.machine import describe_device, physical_cores, resolve_device, use_threads
from anybit.engine.models.config import DecoderConfig
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
        "rows": [_row(variant) for variant in variants],
    }


def capacity_of_shape(shape: str, kv_formats: Sequence[str]) -> dict[str, Any]:
    """The report without a model: what sequences of a `model_shapes` shape take, everything counted, per format."""
    config = MODELS[shape]
    return {
        "shape": shape,
        "rows": [
            {
                **_memory(name, config.head_dim),
                "tokens_per_gib": {str(length): _tokens_per_gib(name, length, config) for length in CAPACITY_TOKENS},
            }
            for name in dict.fromkeys((OWN_FORMAT, *kv_formats))
        ],
    }


def _tokens_per_gib(name: str, length: int, config: DecoderConfig) -> int:
    sequence = parse_format(name).sequence_bytes(length, config.head_dim) * config.num_kv_heads * config.num_layers
    return length * 2**30 // sequence


def _row(variant: Variant) -> dict[str, Any]:
    return {
        **_memory(variant.kv_format, variant.decoder.config.head_dim),
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens,
        "top1_agreement": variant.agreements / variant.tokens,
        "tokens_per_second": variant.tokens / variant.seconds,
    }


def _memory(name: str, head_dim: int) -> dict[str, Any]:
    """Bits of an element, and tokens in the same memory as a multiple of bf16's."""
    kv_format, exact = parse_format(name), parse_format(OWN_FORMAT)
    key_bytes, value_bytes = kv_format.record_bytes(head_dim)
    return {
        "kv_format": name,
        "key_bits": 8 * key_bytes / (PAGE_SIZE * head_dim),
        "value_bits": 8 * value_bytes / (PAGE_SIZE * head_dim),
        "capacity": {
            str(length): exact.sequence_bytes(length, head_dim) / kv_format.sequence_bytes(length, head_dim)
            for length in CAPACITY_TOKENS
        },
    }
