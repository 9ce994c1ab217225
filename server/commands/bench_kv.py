"""`anybit bench kv`: what formats of keys and values cost and save."""

import json
import re
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

DEFAULT_CELLS = "1x8192,1x32768,8x4096,32x1024,64x1024,8x8192,8x32768,64x8192"


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
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Time a GPU's kernels at the --shape, beside PyTorch's attention in bfloat16 (flash, cuDNN).",
        ),
    ] = False,
    cells: Annotated[str, typer.Option(help="With --kernels: sequences times tokens that each has.")] = DEFAULT_CELLS,
    json_path: JsonOption = None,
) -> None:
    """KV formats: bits, capacity, and how far answers move from those with bf16 keys and values.

    With --shape and --kernels: the time of attention over them and of sealing on a GPU.
    """
    formats = parse_kv_formats(kv_format)
    (width,) = parse_bit_widths(str(bit_width))
    if json_path is not None and not json_path.parent.is_dir():
        raise typer.BadParameter(f"{json_path.parent} is no directory for --json.")
    if kernels and shape is None:
        raise typer.BadParameter("--kernels needs a --shape.")
    if shape is not None:
        _check_shape(shape, model)
        if kernels:
            report = _time_kernels(shape, _parse_cells(cells), None if kv_format == "all" else formats, device)
            _show(report, [_attention_table(report), _sealing_table(report)], json_path)
        else:
            report = _capacity(shape, formats)
            _show(report, [_capacity_table(report)], json_path)
        return
    resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
    ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))

    from anybit.engine.bench.kv import KVBenchOptions, bench_kv  # noqa: PLC0415 - loads torch

    options = KVBenchOptions(formats, text, context, max_tokens, width, device, threads)
    with stage_progress() as progress:
        report = bench_kv(resolved.checkpoint, options, lambda done, total: progress.update("bench", done, total))
    _show(report, [_table(report)], json_path)


def _check_shape(shape: str, model: str | None) -> None:
    if model is not None:
        raise typer.BadParameter("Name a model or a --shape, not both.")
    if shape not in MODELS:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(MODELS)}.")


def _parse_cells(text: str) -> tuple[tuple[int, int], ...]:
    """ "1x8192,8x4096" -> sequences and tokens of each, in the order given."""
    found = [re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,6})", part.strip()) for part in text.split(",")]
    cells = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if len(cells) < len(found):
        raise typer.BadParameter(f"{text!r} is not a list of cells like 8x4096: sequences times tokens of each.")
    return cells


def _time_kernels(
    shape: str, cells: tuple[tuple[int, int], ...], formats: tuple[str, ...] | None, device: str
) -> dict[str, Any]:
    if device not in ("auto", "cuda"):
        raise typer.BadParameter(f"--kernels are those of a GPU: --device {device} does not go with them.")

    from anybit.engine.bench.kv_kernels import bench_kv_kernels  # noqa: PLC0415 - loads torch

    with stage_progress(refresh_per_second=2) as progress:  # drawing takes time from what is measured
        return bench_kv_kernels(
            shape, cells, formats, device, lambda done, total: progress.update("bench", done, total)
        )


def _capacity(shape: str, formats: tuple[str, ...]) -> dict[str, Any]:
    from anybit.engine.bench.kv import capacity_of_shape  # noqa: PLC0415 - loads torch

    return capacity_of_shape(shape, formats)


def _show(report: dict[str, Any], tables: list[Table], json_path: Path | None) -> None:
    for table in tables:
        Console().print(table)
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


def _attention_table(report: dict[str, Any]) -> Table:
    rows = [row for row in report["rows"] if row["kernel"] == "attention"]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["library_microseconds"]))
    table = Table(
        *("KV", "sequences", "tokens of each", "microseconds a layer"),
        *(*(f"PyTorch's {peer}, bf16" for peer in peers), "times PyTorch's fastest"),
        title=f"Decode attention at the shape of {report['shape']} on {report['device']}",
    )
    for row in rows:
        library = row["library_microseconds"]
        table.add_row(
            *(row["kv_format"], str(row["batch"]), f"{row['context']:,}", f"{row['microseconds']:,.1f}"),
            *(f"{library[peer]:,.1f}" if peer in library else "-" for peer in peers),
            "-" if row["times_library"] is None else f"{row['times_library']:.2f} x",
        )
    return table


def _sealing_table(report: dict[str, Any]) -> Table:
    table = Table(
        *("KV", "pages at once", "microseconds a page, all layers"),
        title="Sealing; a sequence has a page to seal once in 64 steps",
    )
    for row in report["rows"]:
        if row["kernel"] == "seal":
            table.add_row(row["kv_format"], str(row["batch"]), f"{row['microseconds']:,.1f}")
    return table


def _bits(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kv_format"], f"{row['key_bits']:.2f}", f"{row['value_bits']:.2f}"
