"""`anybit quantize`: a source model becomes a nested checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anybit.engine.config import DEFAULT_METHOD
from anybit.engine.quantize.options import SHIPPED, QuantizeOptions
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    MethodOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import describe_location, perplexity_table, stage_progress


def quantize(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or id, a .gguf file, or 'demo'.")],
    destination: Annotated[Path, typer.Argument(help="Directory to create for the checkpoint.")],
    method: MethodOption = DEFAULT_METHOD,
    widths: Annotated[str, typer.Option(help="Widths the checkpoint can be read at.")] = "2,3,4,6,8",
    group_size: GroupSizeOption = "auto",
    per_channel: Annotated[bool, typer.Option("--per-channel", help="One scale and zero for a whole row.")] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|shipped",
            help="UTF-8 text to calibrate on, repeatable; without it, the one that ships with AnyBit.",
            show_default=False,
        ),
    ] = None,
    kv_calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|shipped",
            help="UTF-8 text to balance keys on, for compressed KV formats, repeatable; without it, done at every start.",
            show_default=False,
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=4, max=1 << 16, help="Windows of the text to use.", show_default=False),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, max=1 << 17, help="Tokens of one window.", show_default=False)
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="Added to Hessians, as a share of their mean diagonal.", show_default=False),
    ] = None,
    true_sequential: Annotated[
        bool, typer.Option("--true-sequential", help="Calibrate a layer on what is solved of its own block too.")
    ] = False,
    stages: Annotated[int, typer.Option(min=1, max=2, help="1 solves codes and scales; 2 trains scales too.")] = 2,
    seed: Annotated[int, typer.Option(help="Chooses the windows and their order.")] = 0,
    device: DeviceOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No table at the end.")] = False,
) -> None:
    """Quantize a model once, for every width; ends with the perplexity of each width on a short text.

    A run that was stopped goes on where it was when the same command is given again.
    """
    options = QuantizeOptions(
        method=method,
        bit_widths=parse_bit_widths(widths),
        group_size=parse_group_size(group_size),
        per_channel=per_channel,
        calibration=tuple(calibration or (SHIPPED,)),
        kv_calibration=tuple(kv_calibration or ()),
        sequences=sequences,
        context=context,
        damping=damping,
        true_sequential=true_sequential,
        stages=stages,
        seed=seed,
        device=device,
    )
    from anybit.engine.quantize.prepare import prepare_checkpoint  # noqa: PLC0415 - loads torch

    with stage_progress() as progress:
        manifest = prepare_checkpoint(source, destination, options, progress.update)
    if not quiet:
        console = Console()
        console.print(perplexity_table(manifest.perplexity, manifest.perplexity_text))
        console.print(f"Written to {describe_location(destination.resolve())}.")
