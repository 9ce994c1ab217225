"""`anybit bench kernels`: what single operations cost, without a model."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anybit.engine.bench.shapes import DEFAULT_SHAPES, MODEL_SHAPES, Shape, parse_shapes
from anybit.server.commands.options import (
    GroupSizeOption,
    JsonOption,
    ThreadsOption,
    parse_batches,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import stage_progress


def kernels(
    shape: Annotated[
        str, typer.Option(help=f"Shapes of weights: OUTxIN, or all of {', '.join(MODEL_SHAPES)}.")
    ] = DEFAULT_SHAPES,
    bit_width: Annotated[str, typer.Option(help="Widths to measure.")] = "all",
    batch: Annotated[str, typer.Option(help="Numbers of rows computed together.")] = "1",
    group_size: GroupSizeOption = "auto",
    threads: ThreadsOption = 0,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="What computes; auto is the processor.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; the median counts.")] = 5,
    rotation_mib: Annotated[
        int, typer.Option(min=1, help="MiB of weights read before one is read again; far more than the caches hold.")
    ] = 1024,
    reproducible: Annotated[
        bool, typer.Option("--reproducible/--fast", help="On a GPU, kernels as `anybit serve` uses them.")
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Time of linear layers per width and shape, and the share of the memory bandwidth that they reach."""
    if device not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"--device {device} is not auto, cpu or cuda.")
    bit_widths, batches = parse_bit_widths(bit_width), parse_batches(batch)
    group = parse_group_size(group_size)
    shapes = _parse_shapes(shape, group)
    if json_path is not None and not json_path.parent.is_dir():
        raise typer.BadParameter(f"{json_path.parent} is no directory for --json.")

    from anybit.engine.bench.cuda_kernels import bench_cuda_kernels  # noqa: PLC0415 - loads torch
    from anybit.engine.bench.kernels import bench_kernels  # noqa: PLC0415
    from anybit.engine.machine import resolve_device  # noqa: PLC0415

    cells = (shapes, bit_widths, batches, group)
    with stage_progress(refresh_per_second=2) as progress:  # drawing takes time from what is measured

        def update(done: int, total: int) -> None:
            progress.update("bench", done, total)

        if device == "cuda":
            resolve_device(device)  # says so if there is none
            report = bench_cuda_kernels(*cells, rounds, update, rotation_mib << 20, is_fast=not reproducible)
        else:
            report = bench_kernels(*cells, threads, rounds, update, rotation_mib << 20)
    Console().print(_table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _parse_shapes(text: str, group_size: int | None) -> tuple[Shape, ...]:
    try:
        shapes = parse_shapes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    uneven = [shape for shape in shapes if shape.in_features % (group_size or 1)]
    if uneven:
        raise typer.BadParameter(f"The input size of {uneven[0]} is not a multiple of --group-size {group_size}.")
    return shapes


def _table(report: dict[str, Any]) -> Table:
    kind = "read" if "read_gb_per_second" in report else "copy"
    title = f"Linear layers on {report['device']}, {kind} bandwidth {report[f'{kind}_gb_per_second']:.1f} GB/s"
    table = Table("bits", "op", "out", "in", "rows", "microseconds", "GB/s", f"share of {kind} bandwidth", title=title)
    for row in report["rows"]:
        table.add_row(
            row["peer"] or str(row["bit_width"]),
            row["op"],
            str(row["out"]),
            str(row["in"]),
            str(row["m"]),
            f"{row['microseconds']:,.1f}",
            f"{row['gb_per_second']:.1f}",
            f"{row['floor_share']:.2f}",
        )
    return table
