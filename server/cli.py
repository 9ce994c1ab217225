"""The `anybit` command."""

import sys

import typer

from anybit.engine.errors import AnyBitError
from anybit.server.commands import bench, chat, evaluate, inspect, quantize, serve
from anybit.server.version import anybit_version

app = typer.Typer(
    name="anybit",
    help="One nested checkpoint, any bit-width: serve, quantize and measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command()(chat.chat)
app.command()(inspect.inspect)
app.add_typer(bench.app, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"anybit {anybit_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_print_version, is_eager=True),
) -> None:
    """One nested checkpoint, any bit-width: serve, quantize and measure."""


def main() -> None:
    """Run the command line: exit code 0 done, 1 failed with one sentence on standard error, 2 wrong usage."""
    try:
        app()
    except AnyBitError as error:
        print(f"anybit: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
