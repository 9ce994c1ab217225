"""A running server changes to a better checkpoint: real engines, requests all the while, and nothing left behind."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from anybit.engine.weights.progress_file import clear_progress, report_progress
from anybit.engine.weights.resolve import resolve_model
from tests.endtoend.command import ServeCommand, run_anybit
from tests.endtoend.test_serving import wait_for
from tests.fixtures.processes import children, is_running

PROGRAM = (sys.executable, str(Path(__file__).with_name("upgrading_server.py")), "serve")
PROMPT = "The quick brown fox"
MAX_TOKENS = 400
NUM_STREAMS = 4  # so many that one of them is under way whenever the change comes


@pytest.fixture(scope="module")
def prepared(tiny_source: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with finer groups, which gives other texts, under the name of another method."""
    destination = tmp_path_factory.mktemp("prepared") / "tiny"
    result = run_anybit("quantize", tiny_source, destination, "--method", "rtn", "--group-size", "32", cache=cache)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((destination / "anybit.json").read_text())
    (destination / "anybit.json").write_text(json.dumps({**manifest, "method": "best"}))
    return destination


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


@pytest.fixture
def server(tiny_checkpoint: Path, prepared: Path, go: Path, tmp_path: Path) -> Iterator[ServeCommand]:
    paths = (tiny_checkpoint, prepared, tmp_path / "better", go)
    with ServeCommand(*paths, cache=tmp_path / "cache", program=PROGRAM) as server:
        wait_for(lambda: (card(server)["preparing"] or {}).get("progress") == 0.75)
        yield server


def card(server: ServeCommand) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/models/tiny").json()
    return found


def stream_text(server: ServeCommand) -> str:
    stream = server.openai.completions.create(
        model="tiny@4bit", prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0, stream=True,
        extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert usage is not None
    assert usage.completion_tokens == MAX_TOKENS
    return text


def test_streams_go_through_the_change_and_later_ones_get_the_better_weights(server: ServeCommand, go: Path) -> None:
    first = stream_text(server)
    assert card(server)["method"] == "rtn"
    (engine,) = engines(server)
    streams: list[tuple[str, str, str]] = []
    stop = False

    def keep_streaming() -> None:
        while not stop:
            began = card(server)["method"]
            text = stream_text(server)
            streams.append((began, card(server)["method"], text))

    def check_ready() -> int:
        checks = 0
        while not stop:
            assert httpx.get(f"{server.url}/ready").status_code == 200
            checks += 1
            time.sleep(0.05)
        return checks

    with ThreadPoolExecutor(NUM_STREAMS + 1) as pool:
        running = [pool.submit(keep_streaming) for _ in range(NUM_STREAMS)]
        checking = pool.submit(check_ready)
        go.touch()
        try:
            wait_for(lambda: card(server)["method"] == "best", 60)
            wait_for(lambda: not is_running(engine), 60)
        finally:
            stop = True
        for task in running:
            task.result()
        assert checking.result() > 0

    last = stream_text(server)
    assert last != first
    assert {text for _, _, text in streams} <= {first, last}
    assert all(text == last for began, _, text in streams if began == "best")
    assert all(text == first for _, ended, text in streams if ended == "rtn")
    assert ("rtn", "best", first) in streams
    assert card(server)["preparing"] is None
    assert httpx.get(f"{server.url}/version").json()["method"] == "best"
    assert server.metric("anybit_model_info", method="best") == 5
    assert server.metric("anybit_model_info", method="rtn") == 0
    assert server.metric("anybit_generated_tokens_total", bit_width="4") == MAX_TOKENS * (2 + len(streams))
    wait_for(lambda: server.metric("anybit_requests_running") == 0)
    # What the first engine did still counts.
    per_token = card(server)["bytes_read_per_token"]
    assert server.metric("anybit_weight_bytes_read_total", bit_width="4") > 0.3 * MAX_TOKENS * per_token * len(streams)
    assert len(engines(server)) == 1
    assert server.stop() == 0
    assert server.log.count("best answers from now on") == 1
    assert server.log.count("The engine with rtn has ended.") == 1
    assert "Preparing best: quantize 75 % (3 of 4)." in server.log
    assert "ERROR" not in server.log


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_server_that_ends_leaves_no_process(server: ServeCommand, how: signal.Signals) -> None:
    pids = list(children(server.process.pid))
    assert len(pids) == 2
    os.kill(server.process.pid, how)
    assert server.process.wait(30) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not any(map(is_running, pids)))


def test_checkpoint_that_is_damaged_is_told_and_the_first_goes_on(
    server: ServeCommand, prepared: Path, go: Path, tmp_path: Path
) -> None:
    manifest = json.loads((prepared / "anybit.json").read_text())
    text = stream_text(server)
    broken = {**manifest, "files": dict.fromkeys(manifest["files"], "0" * 64)}
    try:
        (prepared / "anybit.json").write_text(json.dumps(broken))
        go.touch()
        wait_for(lambda: card(server)["preparing"] is None, 60)
    finally:
        (prepared / "anybit.json").write_text(json.dumps(manifest))
    assert card(server)["method"] == "rtn"
    assert stream_text(server) == text
    (line,) = [line for line in server.log.splitlines() if "ERROR" in line]
    assert "The change to the method best failed, so rtn goes on answering: " in line
    assert "SHA-256" in line
    wait_for(lambda: len(children(server.process.pid)) == 1)


def test_inspect_says_how_far_a_method_is_and_shows_what_is_served_meanwhile(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"  # in that of all tests the better weights may be there already
    monkeypatch.setenv("ANYBIT_CACHE_DIR", str(cache))
    better = resolve_model(str(tiny_source), "best", None, (2, 3, 4, 6, 8)).checkpoint
    out = tmp_path / "inspect.json"

    def inspect(*arguments: str) -> tuple[str, Any]:
        result = run_anybit("inspect", tiny_source, *arguments, "--json", out, cache=cache)
        assert result.returncode == 0, result.stderr
        return " ".join(result.stdout.split()), json.loads(out.read_text())

    shown, report = inspect("--method", "rtn")
    assert "being prepared" not in shown
    assert report["preparing"] == []
    report_progress(better, "quantize", 12, 30)
    try:
        for method in ("best", "rtn"):
            shown, report = inspect("--method", method)
            assert "best is being prepared: quantize 40 % (12 of 30); until it is ready, rtn is served." in shown
            assert "method rtn" in shown
            assert report["method"] == "rtn"
            assert report["preparing"] == [{"method": "best", "stage": "quantize", "progress": 0.4}]
    finally:
        clear_progress(better)


def engines(server: ServeCommand) -> list[int]:
    return [pid for pid, line in children(server.process.pid).items() if "anybit.engine.process" in line]
