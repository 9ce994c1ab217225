import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ANYBIT = os.environ.get("ANYBIT_COMMAND", "anybit")
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Server:
    url: str
    model: str = MODEL


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with a float32 KV cache, so that judges in float32 can be compared to the third digit."""
    with serving(tmp_path_factory.mktemp("server"), "--kv-format", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def terse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with so little context that no answer takes long."""
    with serving(tmp_path_factory.mktemp("server"), "--max-model-len", "96") as server:
        yield server


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    log_path = directory / "log"
    port = free_port()
    with log_path.open("w") as log:
        command = [ANYBIT, "serve", "--port", str(port), "--method", "rtn", "--log-level", "warning", *options]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_ready(f"http://127.0.0.1:{port}", process, log_path)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in log_path.read_text()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the server serves."""
    report = tmp_path_factory.mktemp("inspect") / "report.json"
    subprocess.run([ANYBIT, "inspect", "--method", "rtn", "--json", report], capture_output=True, check=True)
    return Path(json.loads(report.read_text())["checkpoint"])


@pytest.fixture(scope="session")
def float_model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server computes with at 8 bits, as a float32 Hugging Face model."""
    destination = tmp_path_factory.mktemp("float") / "model"
    python = Path(ANYBIT).with_name("python")
    script = Path(__file__).with_name("export_dequantized.py")
    subprocess.run([python, script, checkpoint, destination, "8"], check=True)
    return destination


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900  # the first start downloads and quantizes
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
