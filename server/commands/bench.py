"""`anybit bench`: the project's own measurements."""

import json
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.config import DEFAULT_METHOD, EngineConfig
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands import bench_kernels, bench_kv, bench_offline, bench_serve
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    LmHeadBitsOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_batches,
    parse_bit_widths,
    parse_group_size,
    parse_kv_formats,
)
from anybit.server.commands.preparation import ensure_prepared, stage_progress

_ROOM = 64  # tokens, for warm-up
_FEWEST_STEP_TOKENS = 256  # of a prompt that a step computes

app = typer.Typer(
    help="Measure speed per width: of this machine alone, or of a server under load.", no_args_is_help=True
)
app.command("kernels")(bench_kernels.kernels)
app.command("kv")(bench_kv.kv)
app.command("offline")(bench_offline.offline)
app.command("serve")(bench_serve.serve)


@app.command()
def decode(
    model: ModelArgument = None,
    bit_width: Annotated[str, typer.Option(help="Widths to measure.")] = "all",
    batch: Annotated[str, typer.Option(help="Numbers of sequences decoded together.")] = "1,8",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache before the clock starts.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps per round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds; the median counts.")] = 3,
    lm_head_bits: LmHeadBitsOption = 8,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    kv_format: Annotated[str, typer.Option(help="Formats of keys and values: bf16,qet4, or all.")] = "bf16",
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    shape: Annotated[
        str | None, typer.Option(help=f"Instead of a model, one of this shape: {', '.join(MODELS)}.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Fill --shape with random weights; nothing is downloaded.")
    ] = False,
    mixed: Annotated[
        str | None, typer.Option(help="Also measure batches whose sequences have these widths in turn, such as 2,4,8.")
    ] = None,
    reproducible: Annotated[
        bool | None, typer.Option("--reproducible/--fast", help="As of `anybit serve`; matters on a GPU.")
    ] = None,
    beside_bf16: Annotated[
        bool,
        typer.Option(
            "--beside-bf16",
            help="Also measure the --shape with bfloat16 weights, as 16 bits, and the first --kv-format (GPU).",
        ),
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Tokens per second of the decode loop, end to end without HTTP."""
    batches = parse_batches(batch)
    bit_widths = parse_bit_widths(bit_width)
    mixed_widths = () if mixed is None else parse_bit_widths(mixed)
    config = EngineConfig(
        checkpoint="",
        model_name=shape or "",
        bit_widths=tuple(sorted({*bit_widths, *mixed_widths})),
        default_bit_width=bit_widths[0],
        lm_head_bits=lm_head_bits,
        max_num_seqs=max(batches),
        device=device,
        threads=threads,
        reproducible=reproducible,
    )
    _check_shape(shape, random_weights, model)
    if beside_bf16 and shape is None:
        raise typer.BadParameter("--beside-bf16 needs a --shape: a checkpoint holds no bfloat16 weights.")
    if shape is None:
        resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
        ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))
        config = replace(config, checkpoint=str(resolved.checkpoint), model_name=resolved.name)

    from anybit.engine.bench.decode import bench_decode  # noqa: PLC0415 - loads torch
    from anybit.engine.bench.random_model import UNQUANTIZED, random_subject  # noqa: PLC0415
    from anybit.engine.bench.subject import loaded_subject  # noqa: PLC0415

    # Every prompt takes a few steps, in which those before it go on.
    needed = context + steps + max(batches) * (context // _FEWEST_STEP_TOKENS + 2) + _ROOM
    alone = [(width,) for width in bit_widths]
    measured = []
    kv_formats = parse_kv_formats(kv_format)
    for name in kv_formats:
        of_format = replace(config, kv_format=name)
        subject = loaded_subject(of_format) if shape is None else random_subject(shape, of_format, needed)
        measured.append((subject, alone if mixed is None else [*alone, mixed_widths]))
    if shape is not None and beside_bf16:
        of_floats = replace(config, bit_widths=(UNQUANTIZED,), default_bit_width=UNQUANTIZED, kv_format=kv_formats[0])
        measured.append((random_subject(shape, of_floats, needed), [(UNQUANTIZED,)]))
    with stage_progress() as progress:
        report = bench_decode(
            measured, batches, context, steps, rounds, lambda done, total: progress.update("bench", done, total)
        )
    Console().print(_table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _check_shape(shape: str | None, random_weights: bool, model: str | None) -> None:
    if (shape is not None) != random_weights:
        raise typer.BadParameter("--shape and --random-weights go together: shapes have no weights of their own.")
    if shape is not None and model is not None:
        raise typer.BadParameter("Name a model or a --shape, not both.")
    if shape is not None and shape not in MODELS:
        raise typer.BadParameter(f"{shape!r} is not one of {', '.join(MODELS)}.")


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['shape']} on {report['device']}, copy bandwidth {report['copy_gb_per_second']:.1f} GB/s"
    table = Table(
        "bits", "KV", "batch", "context", "tokens/s", "ms/step", "MiB of weights/step", "share of floor", title=title
    )
    for row in report["rows"]:
        table.add_row(
            str(row["bit_width"]),
            row["kv_format"],
            str(row["batch"]),
            str(row["context"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['step_milliseconds']:.1f}",
            f"{row['weight_bytes'] / 2**20:.1f}",
            f"{row['floor_share']:.2f}",
        )
    return table
