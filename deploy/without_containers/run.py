"""Executes the Dockerfile's steps in an empty folder, where no container engine is at hand, up to an answered request.

python deploy/without_containers/run.py --target cpu --port 8000 FOLDER [-- MODEL AND OPTIONS OF anybit serve]

Paths of the image become paths below FOLDER. Steps that would change this machine (packages of the system, users) are
left out and said so: Python and, for native kernels, a C++ compiler must be there.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile import Dockerfile, Instruction, Stage, read_dockerfile

CONTEXT = Path(__file__).parents[2]
_CHANGES_THE_MACHINE = re.compile(r"(apt-get|useradd|groupadd)\b")
_ABSOLUTE_PATH = re.compile(r"(?<![\w./:-])/[A-Za-z][\w./-]*")
_READY_SECONDS = 1800


@dataclass(slots=True)
class Image:
    """What the instructions so far have made of a folder."""

    root: Path
    environment: dict[str, str]
    directory: str = "/"
    paths: set[str] = field(default_factory=set)  # of the image, as it names them
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path of the image lies."""
        absolute = path if path.startswith("/") else f"{self.directory}/{path}"
        return self.root / os.path.normpath(absolute).lstrip("/")

    def know(self, path: str) -> None:
        self.paths.add("/" + os.path.normpath(path).strip("/"))

    def localize(self, text: str) -> str:
        """The text with the image's paths as they lie here; ValueError for one that no instruction has named before."""

        def replace(match: re.Match[str]) -> str:
            path = match[0]
            if not any(path == known or path.startswith(f"{known}/") for known in self.paths):
                raise ValueError(f"{path} is no path that the Dockerfile has made.")
            return f"{self.root}{path}"

        return _ABSOLUTE_PATH.sub(replace, text)

    def run(self, command: list[str]) -> None:
        subprocess.run(command, cwd=self.place("."), env=self.environment, check=True)


def build(dockerfile: Dockerfile, target: str, folder: Path) -> Image:
    """Execute the stages of `target`, and those that it copies from."""
    tools = folder / "tools"
    tools.mkdir(parents=True)
    (tools / "python").symlink_to(sys.executable)
    built: dict[str, Image] = {}

    def build_stages(stages: list[Stage]) -> Image:
        image = Image(folder / stages[-1].name, {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"})
        image.root.mkdir()
        for stage in stages:
            print(f"== {stage.name}", flush=True)
            for instruction in stage.instructions:
                source = instruction.options.get("from")
                if source is not None and source not in built:
                    built[source] = build_stages(dockerfile.lineage(source))
                execute(instruction, image, built.get(source or ""))
        return image

    return build_stages(dockerfile.lineage(target))


def execute(instruction: Instruction, image: Image, source: Image | None) -> None:
    """One instruction; `source` is the stage that a COPY copies from."""
    text = instruction.text
    match instruction.name:
        case "RUN":
            changes = _CHANGES_THE_MACHINE.match(text) is not None
            print(f"{'left out' if changes else 'RUN'}: {text}", flush=True)
            if not changes:
                image.run(["sh", "-ec", image.localize(text)])
        case "COPY":
            print(f"COPY: {text}", flush=True)
            copy(instruction, image, source)
        case "WORKDIR":
            image.know(text)
            image.directory = text
            image.place(".").mkdir(parents=True, exist_ok=True)
        case "ENV" | "ARG":
            for name, value in re.findall(r'(\w+)=("[^"]*"|\S*)', text):
                set_variable(image, name, value.strip('"'), is_default=instruction.name == "ARG")
        case "VOLUME":
            image.know(text)
            image.place(text).mkdir(parents=True, exist_ok=True)
        case "ENTRYPOINT":
            image.entrypoint = instruction.words
        case "CMD":
            image.command = instruction.words
        case "HEALTHCHECK":
            image.health_check = json.loads(text.removeprefix("CMD "))
        case "USER" | "EXPOSE" | "STOPSIGNAL":
            pass
        case name:
            raise ValueError(f"There is no rule for {name}.")


def set_variable(image: Image, name: str, value: str, is_default: bool) -> None:
    if is_default and name in image.environment:
        return
    parts = value.split(":")
    for path in parts:
        if path.startswith("/"):
            image.know(path)
    expanded = ":".join(map(image.localize, parts))
    image.environment[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: image.environment.get(match[1], ""), expanded)


def copy(instruction: Instruction, image: Image, source: Image | None) -> None:
    *names, destination = instruction.words
    image.know(destination)
    target = image.place(destination)
    for name in names:
        origin = CONTEXT / name if source is None else source.place(name)
        if origin.is_dir():
            shutil.copytree(origin, target, dirs_exist_ok=True, ignore=_ignored if source is None else None)
        else:
            place = target / origin.name if destination.endswith("/") else target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(origin, place)


def _ignored(directory: str, names: list[str]) -> set[str]:
    lines = (CONTEXT / ".dockerignore").read_text().split()
    patterns = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


def serve(image: Image, arguments: list[str], port: int) -> str:
    """Start what a container would start, wait until it is healthy and ready, and return a request's answer."""
    environment = {**image.environment, "ANYBIT_HOST": "127.0.0.1", "ANYBIT_PORT": str(port)}
    command = [*image.entrypoint, *(arguments or image.command)]
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise FileNotFoundError(command[0])
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([program, *command[1:]], cwd=image.place("."), env=environment) as server:
        try:
            _wait(server, lambda: _opens(f"{address}/ready"))
            subprocess.run(image.health_check, env=environment, check=True, cwd=image.place("."))
            body = json.dumps({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}).encode()
            request = urllib.request.Request(
                f"{address}/v1/completions", body, {"Content-Type": "application/json", "X-Bit-Width": "8"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
        finally:
            server.send_signal(signal.SIGTERM)
        if server.wait(60) != 0:
            raise RuntimeError(f"The server ended with {server.returncode}.")
    return str(answer["choices"][0]["text"])


def _wait(server: "subprocess.Popen[bytes]", condition: object) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():  # type: ignore[operator]
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with {server.returncode}.")
        if time.monotonic() > deadline:
            raise TimeoutError(f"The server was not ready after {_READY_SECONDS} s.")
        time.sleep(0.5)


def _opens(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="does not exist yet, or is empty")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("arguments", nargs="*", help="instead of the Dockerfile's CMD")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty.")
    image = build(read_dockerfile(CONTEXT / "Dockerfile"), options.target, options.folder.resolve())
    print(f"answered: {serve(image, options.arguments, options.port)!r}")


if __name__ == "__main__":
    main()
