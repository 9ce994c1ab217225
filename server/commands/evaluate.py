"""`anybit eval`: what each width costs in quality."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anybit.engine.errors import AnyBitError
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    LmHeadBitsOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import ensure_prepared, stage_progress


def evaluate(
    model: ModelArgument = None,
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to score; without it, a short public-domain text.", show_default=False),
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
    kv_format: Annotated[str, typer.Option(metavar="bf16|float32", help="Format of the KV cache.")] = "bf16",
    lm_head_bits: LmHeadBitsOption = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    method: MethodOption = "rtn",
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    json_path: JsonOption = None,
) -> None:
    """Perplexity of each width, and its distance from the unquantized model where that is at hand."""
    bit_widths = parse_bit_widths(bit_width)
    resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
    ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))

    from anybit.engine.quantize.measure import EvalOptions, evaluate_checkpoint  # noqa: PLC0415 - loads torch

    options = EvalOptions(
        text=text,
        context=context,
        max_tokens=max_tokens,
        bit_widths=bit_widths,
        lm_head_bits=lm_head_bits,
        kv_format=kv_format,
        baselines=tuple(baseline or ()),
        device=device,
        threads=threads,
    )
    unquantized = _find_source(resolved.source, resolved.checkpoint)
    with stage_progress() as progress:
        report = evaluate_checkpoint(
            resolved.checkpoint, unquantized, options, lambda done, total: progress.update("evaluate", done, total)
        )
    Console().print(_table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _find_source(source: str, checkpoint: Path) -> Any:
    """The unquantized model, or None (with a note) when a checkpoint was given whose source is gone."""
    from anybit.engine.quantize.prepare import fetch_source  # noqa: PLC0415 - loads torch
    from anybit.engine.weights.manifest import read_manifest  # noqa: PLC0415

    try:
        return fetch_source(source or read_manifest(checkpoint).source_location)
    except AnyBitError as error:
        Console(stderr=True).print(f"No comparison with the unquantized model: {error}", soft_wrap=True)
        return None


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['model']} on {report['text']}: {report['tokens']} tokens, context {report['context']}"
    table = Table(
        "bits", "scheme", "effective bits", "perplexity", "KL (nats)", "top-1 agreement", "seconds", title=title
    )
    for row in report["results"]:
        table.add_row(
            str(row["bit_width"]),
            row["scheme"],
            f"{row['effective_bits']:.2f}",
            f"{row['perplexity']:,.3f}",
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            "" if row["top1_agreement"] is None else f"{row['top1_agreement']:.3f}",
            f"{row['seconds']:.1f}",
        )
    return table
