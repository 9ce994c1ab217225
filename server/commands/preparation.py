"""Makes sure that a model has a checkpoint before something uses it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from anybit.engine.weights.resolve import ResolvedModel

_STAGES = {
    "download": "Downloading the model",
    "quantize": "Quantizing",
    "measure": "Measuring perplexity",
    "evaluate": "Scoring the text",
    "bench": "Measuring",
}


def ensure_prepared(model: ResolvedModel, method: str, group_size: str, bit_widths: tuple[int, ...]) -> None:
    """Quantize the model into the cache unless that was done before; ends the command if it fails.

    The work is done in a process of its own, so that its memory is given back before serving begins.
    """
    if model.is_prepared:
        return
    command = [sys.executable, "-m", "anybit.server.cli", "quantize", model.source, str(model.checkpoint)]
    command += ["--method", method, "--group-size", group_size, "--widths", ",".join(map(str, bit_widths)), "--quiet"]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise typer.Exit(code if code > 0 else 1)


class StageProgress:
    """Progress bars, one per stage of a long job, on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, int] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(_STAGES[stage], total=total)
        self._progress.update(self._progress.task_ids[self._tasks[stage]], completed=done, total=total)


@contextmanager
def stage_progress(refresh_per_second: float = 10) -> Iterator[StageProgress]:
    """Draws on standard error while the block runs; each drawing holds the interpreter for a moment."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=refresh_per_second) as progress:
        yield StageProgress(progress)


def perplexity_table(perplexity: dict[str, float], text: str) -> Table:
    table = Table("bits", "perplexity", title=f"Perplexity on {text}")
    for label, value in perplexity.items():
        table.add_row(label, f"{value:,.2f}")
    return table


def describe_location(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
