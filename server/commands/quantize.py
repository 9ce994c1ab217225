"""`anybit quantize`: a source model becomes a nested checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anybit.server.commands.options import GroupSizeOption, parse_bit_widths, parse_group_size
from anybit.server.commands.preparation import describe_location, perplexity_table, stage_progress


def quantize(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or id, a .gguf file, or 'demo'.")],
    destination: Annotated[Path, typer.Argument(help="Directory to create for the checkpoint.")],
    method: Annotated[str, typer.Option(metavar="rtn", help="How to quantize.")] = "rtn",
    widths: Annotated[str, typer.Option(help="Widths the checkpoint can be read at.")] = "2,3,4,6,8",
    group_size: GroupSizeOption = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No table at the end.")] = False,
) -> None:
    """Quantize a model once, for every width; ends with the perplexity of each width on a short text."""
    bit_widths, size = parse_bit_widths(widths), parse_group_size(group_size)
    from anybit.engine.quantize.prepare import prepare_checkpoint  # noqa: PLC0415 - loads torch
    from anybit.engine.quantize.run import METHODS, QuantizeOptions  # noqa: PLC0415

    if method not in METHODS:
        raise typer.BadParameter(f"The method {method!r} is not one of {', '.join(METHODS)}.")
    with stage_progress() as progress:
        manifest = prepare_checkpoint(source, destination, QuantizeOptions(method, bit_widths, size), progress.update)
    if not quiet:
        console = Console()
        console.print(perplexity_table(manifest.perplexity, manifest.perplexity_text))
        console.print(f"Written to {describe_location(destination.resolve())}.")
