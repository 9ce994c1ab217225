"""For `llama_cpp_peer.py`: servers as processes of their own, and what else computes while something is measured."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

READY_SECONDS = 180
EXIT_SECONDS = 10
QUIET_SECONDS = 0.3
TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A server with all of its children in a process group that ends with the `with` block."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(EXIT_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def read_line(self) -> str:
        """The next line of its standard output, empty if it ended."""
        return self._process.stdout.readline() if self._process.stdout else ""

    def wait_ready(self, url: str) -> None:
        """Return once `url` answers 200; RuntimeError if that does not happen."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(url, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"A server ended, or took longer than {READY_SECONDS} s, before {url} was ready.")

    def cpu_seconds(self) -> float:
        """Of all processes in its group so far."""
        stats = [_process_stat(path) for path in Path("/proc").glob("[0-9]*/stat")]
        return sum(seconds for group, seconds in stats if group == self._process.pid)


def start_llama_cpp(
    python: str, model: Path, threads: int, streams: int, stream_tokens: int
) -> tuple[ServerProcess, dict[str, Any]]:
    """The peer's server, loaded, and what it says about itself."""
    script = Path(__file__).with_name("llama_cpp_server.py")
    options = {"threads": threads, "streams": streams, "stream-tokens": stream_tokens}
    server = ServerProcess([python, str(script), str(model), *_arguments(options)])
    try:
        line = server.read_line()
        if not line:
            raise SystemExit("llama.cpp did not start. `pip install xllamacpp`, or say where it is with --peer-python.")
        about = json.loads(line)
        server.wait_ready(f"{about['address']}/health")
    except BaseException:
        server.close()
        raise
    return server, about


def start_anybit(threads: int) -> tuple[ServerProcess, str]:
    """`anybit serve` with the demo model, ready, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = {"threads": threads, "port": port, "log-level": "WARNING"}
    server = ServerProcess([sys.executable, "-m", "anybit.server.cli", "serve", *_arguments(options)])
    try:
        server.wait_ready(f"http://127.0.0.1:{port}/ready")
    except BaseException:
        server.close()
        raise
    return server, f"http://127.0.0.1:{port}"


class OtherLoad:
    """How many cores computed, meanwhile, for something else than this process and the measured server.

    An idle server counts as something else too: neither may disturb the other. Threads that wait for each other in a
    loop, as those of both engines do, lose far more than the share that others take.
    """

    def __init__(self, server: ServerProcess | None = None) -> None:
        self._server = server
        self._start = self._read()

    def cores(self) -> float:
        elapsed, busy, measured = (now - before for now, before in zip(self._read(), self._start, strict=True))
        return max(0.0, busy - measured) / elapsed

    def _read(self) -> tuple[float, float, float]:
        measured = time.process_time() + (self._server.cpu_seconds() if self._server else 0)
        return time.perf_counter(), _busy_seconds(), measured


def wait_until_quiet(cores: float, patience_seconds: float) -> None:
    """Return once no more than `cores` compute for something else, or when patience ends."""
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        load = OtherLoad()
        time.sleep(QUIET_SECONDS)
        if load.cores() <= cores:
            return


def _busy_seconds() -> float:
    """Of the CPUs this process may run on, with what a hypervisor took; everything but waiting."""
    own = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in own:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / TICKS


def _process_stat(path: Path) -> tuple[int, float]:
    """The process group, and the CPU seconds used; (0, 0) if it has ended."""
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:
        return 0, 0.0
    return int(fields[2]), (int(fields[11]) + int(fields[12])) / TICKS


def _arguments(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
