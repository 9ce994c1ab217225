"""Makes sure that a model has a checkpoint before something uses it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from anybit.engine.quantize.options import METHODS
from anybit.engine.weights.progress_file import PreparationProgress, read_progress
from anybit.engine.weights.resolve import ResolvedModel, resolve_model

_STAGES = {
    "download": "Downloading the model",
    "quantize": "Quantizing",
    "keys": "Balancing keys",
    "measure": "Measuring perplexity",
    "evaluate": "Scoring the text",
    "tasks": "Answering questions",
    "bench": "Measuring",
}
_FOLLOW_SECONDS = 0.5


def ensure_prepared(model: ResolvedModel, method: str, group_size: str, bit_widths: tuple[int, ...]) -> None:
    """Quantize the model into the cache unless that was done before; ends the command if it fails.

    The work is done in a process of its own, so that its memory is given back before serving begins.
    """
    if not model.is_prepared:
        _follow_others(model.checkpoint)
    if model.is_prepared:
        return
    code = subprocess.run(quantize_command(model, method, group_size, bit_widths), check=False).returncode
    if code != 0:
        raise typer.Exit(code if code > 0 else 1)


def quantize_command(
    model: ResolvedModel, method: str, group_size: str, bit_widths: tuple[int, ...]
) -> tuple[str, ...]:
    """The command line that makes the model's checkpoint."""
    return (
        *(sys.executable, "-m", "anybit.server.cli", "quantize", model.source, str(model.checkpoint)),
        *("--method", method, "--group-size", group_size, "--widths", ",".join(map(str, bit_widths)), "--quiet"),
    )


def find_preparations(
    model: str | None, group_size: int | None, bit_widths: tuple[int, ...], source: str
) -> dict[str, PreparationProgress]:
    """The methods by which the model's checkpoint is being made now, by whatever process, and how far each is."""
    found = {}
    for method in METHODS:
        resolved = resolve_model(model, method, group_size, bit_widths, source)
        progress = None if resolved.is_prepared else read_progress(resolved.checkpoint)
        if progress is not None:
            found[method] = progress
    return found


def _follow_others(checkpoint: Path) -> None:
    """Wait while another process makes this checkpoint: to make it a second time would take no less."""
    if read_progress(checkpoint) is None:
        return
    Console(stderr=True).print("Another process is preparing this model; its progress:")
    with stage_progress() as bars:
        while (progress := read_progress(checkpoint)) is not None:
            bars.update(progress.stage, progress.done, progress.total)
            time.sleep(_FOLLOW_SECONDS)


class StageProgress:
    """Progress bars, one per stage of a long job, on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, int] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(_STAGES.get(stage, stage.capitalize()), total=total)
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
