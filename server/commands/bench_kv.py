"""`anybit bench kv`: what formats of keys and values cost and save."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.config import DEFAULT_METHOD
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_bit_widths,
    parse_group_size,
    parse_kv_formats,
)
from anybit.server.commands.preparation import ensure_prepared, stage_progress


def kv(
    model: ModelArgument = None,
    kv_format: Annotated[str, typer.Option(help="Formats to measure beside bf16: qet4,qet2, or all.")] = "all",
    text: Annotated[
        Path | None, typer.Option(help="Text to read; by default one that ships with AnyBit.", show_default=False)
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of one window; windows do not overlap.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read no more of the text.")] = 16384,
    bit_width: Annotated[int, typer.Option(help="Bits of the weights.")] = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    shape: Annotated[
        str | None,
        typer.Option(help=f"Instead of a model, bits and capacity of one of this shape: {', '.join(MODELS)}."),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """KV formats: bits, capacity, and how far answers move from those with bf16 keys and values."""
    formats = parse_kv_formats(kv_format)
    (width,) = parse_bit_widths(str(bit_width))
    if shape is not None:
        _show(_capacity(shape, formats, model), json_path)
        return
    resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
    ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))

    from anybit.engine.bench.kv import KVBenchOptions, bench_kv  # noqa: PLC0415 - loads torch

    options = KVBenchOptions(formats, text, context, max_tokens, width, device, threads)
    with stage_progress() as progress:
        report = bench_kv(resolved.checkpoint, options, lambda done, total: progress.update("bench", done, total))
    _show(report, json_path)


def _capacity(shape: str, formats: tuple[str, ...], model: str | None) -> dict[str, Any]:
    if model is not None:
        raise typer.BadParameter("Name a model or a --shape, not both.")
    if shape not in MODELS:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(MODELS)}.")

    from anybit.engine.bench.kv import capacity_of_shape  # noqa: PLC0415 - loads torch

    return capacity_of_shape(shape, formats)


def _show(report: dict[str, Any], json_path: Path | None) -> None:
    Console().print(_capacity_table(report) if "shape" in report else _table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['model']} at {report['bit_width']} bits on {report['tokens']} tokens, context {report['context']}"
    lengths = list(report["rows"][0]["capacity"])
    table = Table(
        *("KV", "bits of keys", "of values", *(f"tokens a GiB, {length}" for length in lengths)),
        *("KL (nats)", "top-1 agreement", "perplexity", "tokens/s"),
        title=title,
    )
    for row in report["rows"]:
        table.add_row(
            *_bits(row),
            *(f"{row['capacity'][length]:.2f} x" for length in lengths),
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['tokens_per_second']:.0f}",
        )
    return table


def _capacity_table(report: dict[str, Any]) -> Table:
    lengths = list(report["rows"][0]["capacity"])
    table = Table(
        *("KV", "bits of keys", "of values", *(f"tokens a GiB, {length}" for length in lengths)),
        title=f"Keys and values at the shape of {report['shape']}",
    )
    for row in report["rows"]:
        table.add_row(
            *_bits(row),
            *(f"{row['tokens_per_gib'][length]:,} ({row['capacity'][length]:.2f} x)" for length in lengths),
        )
    return table


def _bits(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kv_format"], f"{row['key_bits']:.2f}", f"{row['value_bits']:.2f}"
