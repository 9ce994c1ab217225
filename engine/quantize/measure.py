"""Builds the variants of a model that an evaluation compares, and turns their scores into a report."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from anybit.engine.config import ConfigError
from anybit.engine.errors import SourceError
from anybit.engine.machine import describe_device, keep_freed_memory, physical_cores, resolve_device
from anybit.engine.models.decoder import WeightLoader, build_decoder
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.evaluate import BUILTIN_TEXT, Variant, builtin_text, evaluate, windows
from anybit.engine.quantize.matquant_slice import MatQuantSliceLoader
from anybit.engine.weights.accounting import effective_bits, linear_entries
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import DenseLoader, NestedLoader
from anybit.engine.weights.source import SourceModel
from anybit.kernels.cpu.library import set_threads

Progress = Callable[[int, int], None]
_QUICK_CONTEXT = 1024
MATQUANT_SLICE = "matquant-slice"
BASELINES = (MATQUANT_SLICE,)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """`text` None is the text that ships with the package; `bit_widths` empty means all of the checkpoint; `threads` 0
    the physical cores."""

    text: Path | None = None
    context: int = 1024
    max_tokens: int | None = None
    bit_widths: tuple[int, ...] = ()
    lm_head_bits: int = 8
    kv_format: str = "bf16"
    baselines: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 0


def evaluate_checkpoint(
    directory: Path, source: SourceModel | None, options: EvalOptions, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """The `eval` report of CONTRACT for a checkpoint; with its source also the float row, KL and top-1 agreement."""
    keep_freed_memory()
    # The float model is PyTorch's work and the widths that of the native kernels, one after the other.
    threads = options.threads or physical_cores()
    set_threads(threads)
    torch.set_num_threads(threads)
    reader = CheckpointReader(directory)
    made = reader.manifest.bit_widths
    bit_widths = options.bit_widths or made
    absent = [width for width in bit_widths if width not in made]
    if absent:
        raise ConfigError(f"The checkpoint was made for the widths {', '.join(map(str, made))}, not for {absent[0]}.")
    text = builtin_text() if options.text is None else _read_text(options.text)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    token_windows = windows(token_ids, options.context, options.max_tokens, _first_tokens(tokenizer))

    variants = _nested_variants(reader, bit_widths, options)
    reference = None
    if source is not None:
        reference = _float_variant(source, options)
        variants.insert(0, reference)
        for baseline in options.baselines:
            variants += [_baseline_variant(baseline, source, reader, width, options) for width in bit_widths]
    elif options.baselines:
        raise SourceError("A baseline needs the unquantized model, which is not at hand for this checkpoint.")
    evaluate(variants, token_windows, reference, progress)
    return {
        "model": reader.manifest.source_name,
        "text": BUILTIN_TEXT if options.text is None else options.text.name,
        "tokens": variants[0].tokens,
        "context": options.context,
        "machine": f"{platform.machine()}, {describe_device(resolve_device(options.device))}, torch {torch.__version__}",
        "method": reader.manifest.method,
        "group_size": reader.manifest.group_size,
        "results": [_row(variant, compared=reference is not None) for variant in variants],
    }


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text: a BOS without which some models predict poorly, or nothing."""
    encoded = tokenizer.encode("a")
    added = takewhile(lambda pair: pair[1], zip(encoded.ids, encoded.special_tokens_mask, strict=True))
    return [token_id for token_id, _ in added]


def quick_perplexity(directory: Path, source: SourceModel, progress: Progress) -> tuple[dict[str, float], str]:
    """Perplexity of one window of the shipped text for the float model and every width, for a new manifest."""
    context = min(_QUICK_CONTEXT, parse_config(source.config).max_position_embeddings)
    options = EvalOptions(context=context, max_tokens=context)
    report = evaluate_checkpoint(directory, source, options, progress)
    measured = {str(row["bit_width"]): round(row["perplexity"], 4) for row in report["results"]}
    return measured, f"{report['text']}, first {context} tokens"


def _nested_variants(reader: CheckpointReader, bit_widths: Sequence[int], options: EvalOptions) -> list[Variant]:
    device = resolve_device(options.device)
    loader = NestedLoader(reader, bit_widths, options.lm_head_bits, device)
    config = parse_config(json.loads((reader.directory / "config.json").read_text()))
    decoder = build_decoder(config, loader, options.context, device=device)
    return [
        Variant(str(width), decoder, width, options.kv_format, effective_bits(linear_entries(reader.manifest), width))
        for width in bit_widths
    ]


def _float_variant(source: SourceModel, options: EvalOptions) -> Variant:
    loader = DenseLoader(source, device=resolve_device(options.device))
    return _dense_variant("float", loader, source, 8, options, 32.0, "float")


def _baseline_variant(
    baseline: str, source: SourceModel, reader: CheckpointReader, width: int, options: EvalOptions
) -> Variant:
    if baseline != MATQUANT_SLICE:
        raise ConfigError(f"The baseline {baseline!r} is not one of {', '.join(BASELINES)}.")
    label = reader.manifest.group_size
    group_size = None if label == "auto" else int(label)
    dense = DenseLoader(source, device=resolve_device(options.device))
    loader = MatQuantSliceLoader(dense, group_size, width, options.lm_head_bits)
    # A slice reads bit r+1 to round (8 bits have none to read) and one scale and zero per group.
    linears = linear_entries(reader.manifest)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
    floats = sum(32 * entry.shape[0] * entry.shape[1] / entry.group_size for entry in linears)
    return _dense_variant(str(width), loader, source, width, options, min(width + 1, 8) + floats / weights, baseline)


def _dense_variant(
    label: str,
    loader: WeightLoader,
    source: SourceModel,
    width: int,
    options: EvalOptions,
    bits: float,
    scheme: str,
) -> Variant:
    device = resolve_device(options.device)
    decoder = build_decoder(parse_config(source.config), loader, options.context, device=device)
    return Variant(label, decoder, width, options.kv_format, bits, scheme)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The text {path} cannot be read as UTF-8.") from error


def _row(variant: Variant, compared: bool) -> dict[str, Any]:
    return {
        "bit_width": "float" if variant.label == "float" else int(variant.label),
        "scheme": variant.scheme,
        "kv_format": variant.kv_format,
        "effective_bits": round(variant.effective_bits, 4),
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens if compared else None,
        "top1_agreement": variant.agreements / variant.tokens if compared else None,
        "seconds": round(variant.seconds, 2),
    }
