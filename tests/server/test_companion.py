"""A command beside the server: low in priority, told when it fails, and never left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anybit.engine.errors import AnyBitError
from anybit.server.companion import run_companion
from tests.fixtures.processes import is_running
from tests.fixtures.sentences import assert_one_sentence
from tests.waiting import wait_until

LINGER = """
import os, sys, time
with open(sys.argv[1] + ".new", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(60)
"""


def run(program: str, *arguments: str | Path) -> int:
    """How often it was polled."""
    polls: list[None] = []
    command = (sys.executable, "-c", program, *map(str, arguments))
    asyncio.run(run_companion(command, lambda: polls.append(None)))
    return len(polls)


def test_command_runs_to_its_end_with_the_lowest_priority(tmp_path):
    told = "f'{os.nice(0)} {os.sched_getscheduler(0) == os.SCHED_IDLE} {os.getsid(0) == os.getpid()}'"
    assert run(f"import os, sys; open(sys.argv[1], 'w').write({told})", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "19 True True"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('Quantizing 40 %', file=sys.stderr); sys.exit('anybit: The disk is full; free some space.')",
         "The disk is full; free some space."),
        ("raise ValueError('what')", "ValueError: what."),
        ("import sys; sys.exit(3)", "It ended with the code 3 and said nothing."),
        ("import os; os.kill(os.getpid(), 9)", "It was ended by SIGKILL, perhaps because memory ran out."),
    ],
)  # fmt: skip
def test_failure_is_one_sentence(program, reason):
    with pytest.raises(AnyBitError) as caught:
        run(program)
    assert str(caught.value) == reason
    assert_one_sentence(caught.value)


def test_cancelled_wait_ends_the_command(tmp_path):
    async def scenario() -> int:
        task = asyncio.create_task(run_companion((sys.executable, "-c", LINGER, str(tmp_path / "pid")), lambda: None))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return pid

    assert not is_running(asyncio.run(scenario()))


def test_command_that_ignores_the_request_to_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("anybit.server.companion._EXIT_SECONDS", 0.2)
    program = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + LINGER

    async def scenario() -> int:
        task = asyncio.create_task(run_companion((sys.executable, "-c", program, str(tmp_path / "pid")), lambda: None))
        while not (tmp_path / "pid").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return int((tmp_path / "pid").read_text())

    assert not is_running(asyncio.run(scenario()))


def test_command_dies_with_the_process_that_wanted_it(tmp_path):
    program = (
        "import asyncio, sys; from anybit.server.companion import run_companion\n"
        "asyncio.run(run_companion(sys.argv[1:], lambda: None))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, sys.executable, "-c", LINGER, str(tmp_path / "pid")])
    wait_until((tmp_path / "pid").exists, "the command did not start")
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_running(pid), "the command lives on")


def test_command_of_a_process_that_is_gone_already_is_not_begun(tmp_path):
    command = [sys.executable, "-m", "anybit.server.companion", str(os.getpid() + 1), sys.executable, "-c", LINGER]
    began = time.monotonic()
    assert subprocess.run([*command, str(tmp_path / "pid")], check=False).returncode == 1
    assert time.monotonic() - began < 30
    assert not (tmp_path / "pid").exists()
