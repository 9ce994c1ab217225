"""The report of an evaluation: every variant of a model on the same text and questions."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from anybit.engine.config import ConfigError
from anybit.engine.errors import SourceError
from anybit.engine.evaluate.accuracy import score_tasks
from anybit.engine.evaluate.choices import score_questions
from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.options import EvalOptions
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.questions import Question, TokenQuestion, tokenize_question
from anybit.engine.evaluate.text import BUILTIN_TEXT, builtin_text, read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.machine import describe_device, keep_freed_memory, physical_cores, resolve_device
from anybit.engine.models.registry import parse_config, read_config
from anybit.engine.text_prefix import first_tokens
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.source import SourceModel
from anybit.kernels.cpu.bindings import set_threads

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage is "evaluate" for the text or "tasks" for the questions."""
_QUICK_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class _Material:
    """What is scored, as token ids."""

    windows: list[list[int]]
    questions: list[TokenQuestion]

    @property
    def longest(self) -> int:
        return max([0, *map(len, self.windows), *(question.num_tokens for question in self.questions)])


def evaluate_checkpoint(
    directory: Path,
    source: SourceModel | None,
    options: EvalOptions,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The `eval` report of CONTRACT for a checkpoint; with its source also the float row, KL and top-1 agreement."""
    keep_freed_memory()
    # The float model is PyTorch's work and the widths that of the native kernels, one after the other.
    threads = options.threads or physical_cores()
    set_threads(threads)
    torch.set_num_threads(threads)
    reader = CheckpointReader(directory)
    bit_widths = _bit_widths(reader, options)
    material = _tokenize(directory, options)
    variants, reference = _variants(reader, source, bit_widths, material.longest, options)
    if material.windows:
        score_windows(variants, material.windows, reference, lambda done, total: progress("evaluate", done, total))
    rows = [_row(variant, compared=reference is not None) for variant in variants] if material.windows else []
    scores = score_questions(variants, material.questions, lambda done, total: progress("tasks", done, total))
    return {
        "model": reader.manifest.source_name,
        "text": None if not options.perplexity else BUILTIN_TEXT if options.text is None else options.text.name,
        "tokens": variants[0].tokens,
        "context": options.context,
        "machine": f"{platform.machine()}, {describe_device(resolve_device(options.device))}, torch {torch.__version__}",
        "method": reader.manifest.method,
        "group_size": reader.manifest.group_size,
        "results": rows,
        "tasks": [
            row
            for variant, scored in zip(variants, scores, strict=True)
            for row in _task_rows(variant, options.questions, scored)
        ],
    }


def quick_perplexity(
    directory: Path, source: SourceModel, progress: Callable[[int, int], None]
) -> tuple[dict[str, float], str]:
    """Perplexity of one window of the shipped text for the float model and every width, for a new manifest."""
    context = min(_QUICK_CONTEXT, parse_config(source.config).max_position_embeddings)
    options = EvalOptions(context=context, max_tokens=context)
    report = evaluate_checkpoint(directory, source, options, lambda _, done, total: progress(done, total))
    measured = {str(row["bit_width"]): round(row["perplexity"], 4) for row in report["results"]}
    return measured, f"{report['text']}, first {context} tokens"


def _bit_widths(reader: CheckpointReader, options: EvalOptions) -> tuple[int, ...]:
    made = reader.manifest.bit_widths
    absent = [width for width in options.bit_widths if width not in made]
    if absent:
        raise ConfigError(f"The checkpoint was made for the widths {', '.join(map(str, made))}, not for {absent[0]}.")
    return options.bit_widths or made


def _tokenize(directory: Path, options: EvalOptions) -> _Material:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    first = first_tokens(tokenizer)
    token_windows: list[list[int]] = []
    if options.perplexity:
        text = builtin_text() if options.text is None else read_text(options.text)
        token_windows = windows(encode(text), options.context, options.max_tokens, first)
    limit = read_config(directory).max_position_embeddings
    questions = [
        tokenize_question(question, [encode(text) for text in question.texts], first, limit)
        for question in options.questions
    ]
    return _Material(token_windows, questions)


def _variants(
    reader: CheckpointReader,
    source: SourceModel | None,
    bit_widths: Sequence[int],
    max_positions: int,
    options: EvalOptions,
) -> tuple[list[Variant], Variant | None]:
    """All that is scored, and which of it is the unquantized model."""
    device = resolve_device(options.device)
    comparison = Comparison(reader, max_positions, options.lm_head_bits, options.kv_formats, device)
    if source is None:
        if options.baselines:
            raise SourceError("A baseline needs the unquantized model, which is not at hand for this checkpoint.")
        return comparison.nested(bit_widths), None
    reference = comparison.unquantized(source)
    baselines = [comparison.baseline(name, source, width) for name in options.baselines for width in bit_widths]
    return [reference, *comparison.nested(bit_widths), *baselines], reference


def _row(variant: Variant, compared: bool) -> dict[str, Any]:
    return {
        **_label(variant),
        "effective_bits": round(variant.effective_bits, 4),
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens if compared else None,
        "top1_agreement": variant.agreements / variant.tokens if compared else None,
        "seconds": round(variant.seconds, 2),
    }


def _task_rows(variant: Variant, questions: Sequence[Question], scores: list[list[float]]) -> list[dict[str, Any]]:
    return [{**_label(variant), **score.to_json()} for score in score_tasks(questions, scores)]


def _label(variant: Variant) -> dict[str, Any]:
    return {
        "bit_width": "float" if variant.label == "float" else int(variant.label),
        "scheme": variant.scheme,
        "kv_format": variant.kv_format,
    }
