"""`anybit eval`: what each width costs in quality."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anybit.engine.config import DEFAULT_METHOD
from anybit.engine.errors import AnyBitError
from anybit.engine.evaluate.options import EvalOptions
from anybit.engine.evaluate.questions import builtin_questions, read_questions
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.evaluation_tables import task_tables, text_table
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    LmHeadBitsOption,
    MethodOption,
    SourceOption,
    ThreadsOption,
    parse_api_key,
    parse_base_url,
    parse_bit_widths,
    parse_group_size,
    parse_kv_formats,
)
from anybit.server.commands.preparation import ensure_prepared, stage_progress

_BUILTIN = Path("builtin")
# What a server has decided already.
_OFFLINE_ONLY = ("baseline", "kv_format", "lm_head_bits", "device", "threads", "method", "group_size", "source")


def evaluate(
    context_of_command: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="An AnyBit checkpoint, a Hugging Face directory or id, or a .gguf file; without it, the demo model. "
            "With --base-url the name of a served model; without it, the server's first.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to score, or builtin for a short public-domain text, which is also scored if neither "
            "--text nor --tasks is given.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="Multiple-choice questions to answer: a file with one JSON object per line (question, choices, "
            "answer as a number from 0, task), or builtin for 40 easy ones.",
            show_default=False,
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Score through this running server instead.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=["ANYBIT_API_KEY", "OPENAI_API_KEY"], help="Its key.", show_default=False)
    ] = None,
    bit_width: Annotated[str, typer.Option(help="Widths to score.")] = "all",
    context: Annotated[
        int, typer.Option(min=2, max=1 << 20, help="Tokens of one window; windows do not overlap.")
    ] = 1024,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Score no more of the text.", show_default=False)
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Also score a baseline: matquant-slice.", show_default=False)
    ] = None,
    kv_format: Annotated[str, typer.Option(help="Formats of the KV cache: bf16,qet4, or all.")] = "bf16",
    lm_head_bits: LmHeadBitsOption = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    json_path: JsonOption = None,
) -> None:
    """Perplexity and answers of each width, and their distance from the unquantized model where that is at hand."""
    bit_widths = parse_bit_widths(bit_width)
    _check_options(context_of_command, served=base_url is not None)
    questions = () if tasks is None else tuple(builtin_questions() if tasks == _BUILTIN else read_questions(tasks))
    scored: dict[str, Any] = {
        "text": None if text == _BUILTIN else text,
        "perplexity": text is not None or tasks is None,
        "questions": questions,
        "context": context,
        "max_tokens": max_tokens,
    }
    if base_url is not None:
        report = _evaluate_served(parse_base_url(base_url), parse_api_key(api_key), model, bit_width, scored)
    else:
        resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
        ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))
        scored |= {
            "bit_widths": bit_widths,
            "lm_head_bits": lm_head_bits,
            "kv_formats": parse_kv_formats(kv_format),
            "baselines": tuple(baseline or ()),
            "device": device,
            "threads": threads,
        }
        report = _evaluate_offline(resolved.checkpoint, resolved.source, scored)
    console = Console()
    if report["results"]:
        console.print(text_table(report))
    for table in task_tables(report):
        console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _evaluate_offline(checkpoint: Path, source: str, options: dict[str, Any]) -> dict[str, Any]:
    from anybit.engine.evaluate.report import evaluate_checkpoint  # noqa: PLC0415 - loads torch

    unquantized = _find_source(source, checkpoint)
    with stage_progress() as progress:
        return evaluate_checkpoint(checkpoint, unquantized, EvalOptions(**options), progress.update)


def _evaluate_served(
    base_url: str, api_key: str | None, model: str | None, bit_width: str, options: dict[str, Any]
) -> dict[str, Any]:
    from anybit.server.scoring.run import ScoringOptions, evaluate_server  # noqa: PLC0415 - httpx

    settings = ScoringOptions(bit_width=bit_width, **options)
    with stage_progress() as progress:
        return asyncio.run(evaluate_server(base_url, api_key, model, settings, progress.update))


def _check_options(context: typer.Context, served: bool) -> None:
    """Refuses what was given and would be left unused."""
    given = {
        name
        for name in (*_OFFLINE_ONLY, "api_key")
        if (place := context.get_parameter_source(name)) is not None and place.name == "COMMANDLINE"
    }
    for name in _OFFLINE_ONLY:
        if served and name in given:
            raise typer.BadParameter(f"--{name.replace('_', '-')} is the server's business, not for --base-url.")
    if not served and "api_key" in given:
        raise typer.BadParameter("--api-key is for a server; give its address with --base-url.")


def _find_source(source: str, checkpoint: Path) -> Any:
    """The unquantized model, or None (with a note) when a checkpoint was given whose source is gone."""
    from anybit.engine.quantize.prepare import fetch_source  # noqa: PLC0415 - loads torch
    from anybit.engine.weights.manifest import read_manifest  # noqa: PLC0415

    try:
        return fetch_source(source or read_manifest(checkpoint).source_location)
    except AnyBitError as error:
        Console(stderr=True).print(f"No comparison with the unquantized model: {error}", soft_wrap=True)
        return None
