"""Runs the installed `anybit` command, and a server of it, as a user would."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
from openai import OpenAI

ANYBIT = str(Path(sys.executable).with_name("anybit"))


def run_anybit(*arguments: str | Path, cache: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ANYBIT, *map(str, arguments)],
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def environment(cache: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "ANYBIT_CPU_KERNELS"}
    return {**inherited, "ANYBIT_CACHE_DIR": str(cache), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}


class ServeCommand:
    """`anybit serve`, or a `program` like it, in a process of its own on a free port; leaves with SIGTERM."""

    def __init__(
        self,
        *arguments: str | Path,
        cache: Path,
        ready_timeout: float = 120,
        program: tuple[str, ...] = (ANYBIT, "serve"),
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = cache / f"serve-{self.port}.log"
        cache.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*program, *map(str, arguments), "--port", str(self.port)],
                env=environment(cache),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_ready(ready_timeout)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=300)

    def __enter__(self) -> "ServeCommand":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of one metric's series that carry the labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{self.url}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def _wait_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"anybit serve ended with {self.process.returncode}:\n{self.log}")
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"anybit serve was not ready after {timeout} s:\n{self.log}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
