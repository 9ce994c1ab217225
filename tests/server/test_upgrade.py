"""A better checkpoint is made while a quick one is served, and takes over; whatever fails, the quick one goes on."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anybit.engine.errors import AnyBitError, CheckpointError
from anybit.engine.replaceable_engine import ReplaceableEngine
from anybit.engine.weights.manifest import Manifest, write_manifest
from anybit.engine.weights.progress_file import PreparationProgress, read_progress, report_progress
from anybit.engine.weights.resolve import ResolvedModel
from anybit.server.upgrade import ProgressLog, Upgrade, UpgradePlan, UpgradeStatus
from tests.fixtures.processes import children, is_running
from tests.fixtures.sentences import assert_one_sentence
from tests.server.fake_engine import FakeEngine, model_info
from tests.server.live_server import LiveServer
from tests.waiting import wait_until

MAKE = """
import sys, time
from pathlib import Path
from anybit.engine.weights.progress_file import clear_progress, report_progress
checkpoint, prepared, go = map(Path, sys.argv[1:])
report_progress(checkpoint, "quantize", 12, 30)
while not go.exists():
    time.sleep(0.01)
prepared.rename(checkpoint)
clear_progress(checkpoint)
"""


def write_checkpoint(directory: Path, method: str, source_sha256: str = "5" * 64) -> Path:
    directory.mkdir()
    write_manifest(
        directory,
        Manifest(
            method=method, method_options={}, bit_widths=(2, 4, 8), group_size="auto", tensors={}, source_name="tiny",
            source_location="/tiny", source_sha256=source_sha256,
        ),
    )  # fmt: skip
    return directory


class Scene:
    """An engine with rtn, a plan for best, and what comes of it."""

    def __init__(self, folder: Path, program: str = MAKE) -> None:
        self.quick = FakeEngine(replace(model_info(), checkpoint=str(write_checkpoint(folder / "quick", "rtn"))))
        self.better = FakeEngine(replace(model_info(), checkpoint=str(folder / "better"), method="best"))
        self.prepared = write_checkpoint(folder / "prepared", "best")
        self.checkpoint = folder / "better"
        self.go = folder / "go"
        self.started: list[Path] = []
        command = (sys.executable, "-c", program, *map(str, (self.checkpoint, self.prepared, self.go)))
        plan = UpgradePlan("best", ResolvedModel("tiny", self.checkpoint, "source"), command)
        self.engine = ReplaceableEngine(self.quick)
        self.upgrade = Upgrade(plan, self.engine, self._start, 10)

    async def _start(self, checkpoint: Path) -> FakeEngine:
        self.started.append(checkpoint)
        return self.better

    @property
    def method(self) -> str:
        assert self.engine.model is not None
        return self.engine.model.method

    def run(self, *conditions: Callable[[], bool], then: Callable[[], None] = lambda: None) -> None:
        """Start, wait for each condition, act, wait for the end, stop."""

        async def scenario() -> None:
            self.upgrade.start()
            for condition in conditions:
                await self.until(condition)
            then()
            await self.until(lambda: self.upgrade.status is None)
            await self.upgrade.stop()

        asyncio.run(scenario())

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end, "the condition did not come true in time"
            await asyncio.sleep(0.005)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "anybit.server")
    return caplog


def errors(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.ERROR]


def assert_rtn_goes_on(scene: Scene, log: pytest.LogCaptureFixture, reason: str) -> None:
    assert scene.method == "rtn"
    assert not scene.quick.closed
    (line,) = errors(log)
    assert line.startswith("The change to the method best failed, so rtn goes on answering: ")
    assert_one_sentence(line, reason)
    assert read_progress(scene.checkpoint) is None
    assert not list(scene.checkpoint.parent.glob(".*progress*"))


def test_server_says_what_it_serves_and_what_it_prepares(scene, checkpoint, log):
    server = LiveServer(scene.engine, checkpoint, upgrade=scene.upgrade)

    def card() -> dict:
        first, *others = server.http.get("/v1/models").json()["data"]
        assert all((other["method"], other["preparing"]) == (first["method"], first["preparing"]) for other in others)
        return {name: first[name] for name in ("method", "preparing")}

    wait_until(lambda: card()["preparing"]["progress"] > 0, "no progress was told")
    assert card() == {"method": "rtn", "preparing": {"method": "best", "stage": "quantize", "progress": 0.4}}
    assert server.http.get("/v1/models/tiny@4bit").json()["preparing"]["method"] == "best"
    assert server.http.get("/version").json()["method"] == "rtn"
    assert server.metric("anybit_model_info", method="rtn", bit_width="4") == 1
    assert server.complete().status_code == 200
    scene.go.touch()
    wait_until(lambda: scene.quick.closed, "nothing took over", 15)
    assert card() == {"method": "best", "preparing": None}
    assert server.http.get("/version").json()["method"] == "best"
    assert server.metric("anybit_model_info", method="best", bit_width="4") == 1
    assert server.metric("anybit_model_info", method="rtn") is None
    assert server.complete().status_code == 200
    assert (len(scene.quick.requests), len(scene.better.requests)) == (1, 1)
    assert scene.started == [scene.checkpoint]
    server.stop()
    assert scene.better.closed
    for part in (
        "rtn answers while best is prepared in the background.", "Preparing best: quantize 40 % (12 of 30).",
        "best answers from now on", "The engine with rtn has ended.",
    ):  # fmt: skip
        assert log.text.count(part) == 1
    assert errors(log) == []


def test_stream_goes_on_through_the_change_and_the_server_is_always_ready(scene, checkpoint):
    server = LiveServer(scene.engine, checkpoint, upgrade=scene.upgrade)
    expected = server.complete(max_tokens=100, seed=3).json()["choices"][0]["text"]
    scene.quick.token_seconds = 0.5  # the stream outlasts the change, however busy the machine is
    stream = iter(
        server.openai.completions.create(model="tiny", prompt="Hello world", max_tokens=100, seed=3, stream=True)
    )
    text = next(stream).choices[0].text
    scene.go.touch()
    while scene.method == "rtn":
        assert server.http.get("/ready").status_code == 200
    assert not scene.quick.closed
    assert server.http.get("/ready").status_code == 200
    assert server.complete().status_code == 200
    assert len(scene.better.requests) == 1
    scene.quick.token_seconds = 0.0
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    wait_until(lambda: scene.quick.closed, "the old engine stays")
    server.stop()


def test_server_that_stops_ends_the_work_and_loads_nothing(scene, checkpoint, log):
    server = LiveServer(scene.engine, checkpoint, upgrade=scene.upgrade)
    wait_until(lambda: read_progress(scene.checkpoint) is not None, "nothing was begun")
    wait_until(lambda: any("import sys, time" in line for line in children(os.getpid()).values()), "no command")
    (pid,) = (pid for pid, line in children(os.getpid()).items() if "import sys, time" in line)
    server.stop()
    assert not is_running(pid)
    assert scene.quick.closed
    assert scene.started == []
    assert read_progress(scene.checkpoint) is None
    assert errors(log) == []


def test_work_that_fails_is_told_and_changes_nothing(tmp_path, log):
    scene = Scene(tmp_path, "import sys; sys.exit('anybit: The disk is full; free some space.')")
    scene.run()
    assert_rtn_goes_on(scene, log, "The disk is full")
    assert scene.started == []


def test_work_that_makes_nothing_is_told(tmp_path, log):
    scene = Scene(tmp_path, "")
    scene.run()
    assert_rtn_goes_on(scene, log, "There is no checkpoint")


def test_checkpoint_that_somebody_else_made_first_is_served(tmp_path, log):
    program = "import os, sys; os.rename(sys.argv[2], sys.argv[1]); sys.exit('anybit: It already exists.')"
    scene = Scene(tmp_path, program)
    scene.run()
    assert scene.method == "best"
    assert errors(log) == []


@pytest.mark.parametrize(
    "error", [CheckpointError("The checkpoint is damaged; fetch it again."), AnyBitError("The engine process ended.")]
)
def test_engine_that_does_not_start_is_told_and_closed(scene, log, error):
    scene.better.load_error = error
    scene.go.touch()
    scene.run()
    assert_rtn_goes_on(scene, log, str(error).rstrip("."))
    assert scene.better.closed


def test_fault_of_ours_is_told_and_changes_nothing(scene, log, monkeypatch):
    monkeypatch.setattr(scene.upgrade, "_start_successor", lambda checkpoint: 1 / 0)
    scene.go.touch()
    scene.run()
    assert scene.method == "rtn"
    assert len(errors(log)) == 1


def test_checkpoint_of_another_source_is_not_served(scene, log):
    (scene.prepared / "anybit.json").unlink()
    scene.prepared.rmdir()
    write_checkpoint(scene.prepared, "best", "6" * 64)
    scene.go.touch()
    scene.run()
    assert_rtn_goes_on(scene, log, "another source")
    assert scene.started == []


def test_server_that_stops_while_the_second_engine_loads_closes_it(scene, log):
    scene.better.loading = True
    scene.go.touch()

    async def scenario() -> None:
        scene.upgrade.start()
        await scene.until(lambda: bool(scene.started))
        assert scene.upgrade.status == UpgradeStatus("best", "load", 0.0)
        await scene.upgrade.stop()
        await scene.upgrade.stop()

    asyncio.run(scenario())
    assert scene.better.closed
    assert scene.method == "rtn"
    assert scene.upgrade.status is None
    assert errors(log) == []


def test_work_of_another_process_is_waited_for(tmp_path, log):
    scene = Scene(tmp_path, "raise SystemExit('anybit: The same work was done twice.')")
    report_progress(scene.checkpoint, "quantize", 1, 2)

    def finish() -> None:
        scene.prepared.rename(scene.checkpoint)

    scene.run(lambda: scene.upgrade.status == UpgradeStatus("best", "quantize", 0.5), then=finish)
    assert scene.method == "best"
    assert errors(log) == []


def test_work_that_another_process_gives_up_is_taken_up(scene, log):
    report_progress(scene.checkpoint, "quantize", 1, 2)
    scene.go.touch()

    def give_up() -> None:
        (scene.checkpoint.parent / ".better.progress.json").unlink()

    scene.run(lambda: scene.upgrade.status == UpgradeStatus("best", "quantize", 0.5), then=give_up)
    assert scene.method == "best"
    assert errors(log) == []


def test_failed_first_engine_is_told_by_whoever_loads_it(scene, log):
    scene.quick.load_error = CheckpointError("The checkpoint is damaged; fetch it again.")

    async def scenario() -> None:
        scene.upgrade.start()
        await asyncio.sleep(0.05)
        await scene.upgrade.stop()

    asyncio.run(scenario())
    assert log.records == []


def test_log_has_a_line_for_every_tenth_or_half_minute(log):
    now = 1000.0
    lines = ProgressLog("best", lambda: now)

    def note(done: int, stage: str = "quantize") -> bool:
        log.clear()
        lines.note(PreparationProgress(stage, done, 100, 1, 0.0))
        return bool(log.records)

    assert note(0)
    assert not note(0)
    assert not note(9)
    assert note(10)
    assert not note(15)
    now += 29
    assert not note(16)
    now += 1
    assert note(16)
    now += 60
    assert not note(16)
    assert note(17)
    assert note(0, "measure")
