"""What `anybit serve` does about a checkpoint that is not there: waits for it, or serves the quick one meanwhile."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from anybit.engine.weights.manifest import MANIFEST_NAME
from anybit.engine.weights.progress_file import clear_progress, report_progress
from anybit.engine.weights.resolve import ResolvedModel, resolve_model
from anybit.server.cli import app
from anybit.server.commands import preparation, serve

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that was never prepared."""
    monkeypatch.setenv("ANYBIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    return tmp_path / "llama"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run in the foreground; each makes its checkpoint."""
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        commands.append(list(command))
        make(Path(command[5]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(preparation.subprocess, "run", run)
    return commands


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the server, which does not run."""
    calls: list[Any] = []
    monkeypatch.setattr(serve, "_run", lambda *arguments: calls.extend(arguments))
    return calls


def make(checkpoint: Path) -> None:
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST_NAME).write_text("{}")


def resolved(model: Path, method: str) -> ResolvedModel:
    return resolve_model(str(model), method, None, WIDTHS)


def anybit(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def methods(commands: list[list[str]]) -> list[str]:
    return [command[command.index("--method") + 1] for command in commands]


def test_slow_method_is_prepared_while_rtn_is_served(model, ran, served):
    assert anybit("serve", model, "--method", "best", "--group-size", "64").exit_code == 0
    assert methods(ran) == ["rtn"]
    engine_config, server_config, _, plan = served
    quick, better = (resolve_model(str(model), method, 64, WIDTHS) for method in ("rtn", "best"))
    assert engine_config.checkpoint == str(quick.checkpoint)
    assert server_config.checkpoint_dir == quick.checkpoint
    assert (plan.method, plan.model) == ("best", better)
    (quick_command,) = ran
    assert [*plan.command] == [
        {"rtn": "best", str(quick.checkpoint): str(better.checkpoint)}.get(part, part) for part in quick_command
    ]
    assert "--quiet" in plan.command


def test_wait_prepares_before_it_serves(model, ran, served):
    assert anybit("serve", model, "--method", "best", "--wait").exit_code == 0
    assert methods(ran) == ["best"]
    assert served[0].checkpoint == str(resolved(model, "best").checkpoint)
    assert served[3] is None


def test_what_is_prepared_is_served_at_once(model, ran, served):
    make(resolved(model, "best").checkpoint)
    assert anybit("serve", model, "--method", "best").exit_code == 0
    assert ran == []
    assert served[0].checkpoint == str(resolved(model, "best").checkpoint)
    assert served[3] is None


def test_rtn_itself_has_nothing_to_wait_for(model, ran, served):
    for option in ("--wait", "--no-wait"):
        assert anybit("serve", model, "--method", "rtn", option).exit_code == 0
    assert methods(ran) == ["rtn"]
    assert served[3] is None


def test_checkpoint_given_is_served_whatever_the_method(model, ran, served):
    (model / MANIFEST_NAME).write_text("{}")
    assert anybit("serve", model, "--method", "best").exit_code == 0
    assert ran == []
    assert served[0].checkpoint == str(model)
    assert served[3] is None


@pytest.mark.parametrize("command", [("serve",), ("inspect",), ("eval",), ("chat",), ("bench", "decode")])
def test_unknown_method_is_wrong_usage(model, ran, command):
    result = anybit(*command, model, "--method", "magic")
    assert result.exit_code == 2
    assert "'magic' is not one of" in result.output
    assert ran == []


def test_work_of_another_process_is_waited_for(model, ran):
    better = resolved(model, "best")
    report_progress(better.checkpoint, "some stage", 1, 2)

    def finish() -> None:
        time.sleep(0.2)
        make(better.checkpoint)
        clear_progress(better.checkpoint)

    thread = threading.Thread(target=finish)
    thread.start()
    preparation.ensure_prepared(better, "best", "auto", WIDTHS)
    thread.join()
    assert ran == []


def test_work_that_another_process_gave_up_is_done(model, ran, monkeypatch):
    better = resolved(model, "best")
    report_progress(better.checkpoint, "quantize", 1, 2)
    threading.Timer(0.2, clear_progress, [better.checkpoint]).start()
    preparation.ensure_prepared(better, "best", "auto", WIDTHS)
    assert methods(ran) == ["best"]


@pytest.mark.parametrize(("code", "status"), [(1, 1), (2, 2), (-9, 1)])
def test_failed_preparation_ends_the_command(model, monkeypatch, code, status):
    failed = type("Done", (), {"returncode": code})
    monkeypatch.setattr(preparation.subprocess, "run", lambda command, check: failed)
    with pytest.raises(typer.Exit) as caught:
        preparation.ensure_prepared(resolved(model, "best"), "best", "auto", WIDTHS)
    assert caught.value.exit_code == status


def test_preparations_under_way_are_found(model):
    def found() -> dict[str, float]:
        preparations = preparation.find_preparations(str(model), None, WIDTHS, "wheel")
        return {method: progress.share for method, progress in preparations.items()}

    assert found() == {}
    better = resolved(model, "best").checkpoint
    report_progress(better, "quantize", 1, 4)
    assert found() == {"best": 0.25}
    make(better)
    assert found() == {}
