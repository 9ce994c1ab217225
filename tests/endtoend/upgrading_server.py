"""A server that takes over a checkpoint while it runs; in place of a slow method, a file tells when that is made."""

import argparse
import asyncio
import logging
import shutil
import sys
import time
from pathlib import Path

from anybit.engine.config import EngineConfig
from anybit.engine.weights.progress_file import clear_progress, report_progress
from anybit.engine.weights.resolve import ResolvedModel
from anybit.server.config import ServerConfig
from anybit.server.launch import run_server
from anybit.server.upgrade import UpgradePlan

NAME = "tiny"


def serve(quick: Path, prepared: Path, better: Path, go: Path, port: int) -> None:
    """Serve `quick`, and from the moment when `go` exists a copy of `prepared` at `better`."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    command = (sys.executable, __file__, "prepare", *map(str, (prepared, better, go)))
    plan = UpgradePlan("best", ResolvedModel(NAME, better, "source"), command)
    engine_config = EngineConfig(str(quick), NAME, threads=1)
    asyncio.run(run_server(engine_config, ServerConfig(NAME, quick, port=port), plan=plan))


def prepare(prepared: Path, better: Path, go: Path) -> None:
    while not go.exists():
        report_progress(better, "quantize", 3, 4)
        time.sleep(0.05)
    copy = shutil.copytree(prepared, better.with_name("copy"))
    copy.rename(better)
    clear_progress(better)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("serve", "prepare"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.task == "serve":
        serve(*arguments.paths, arguments.port)
    else:
        prepare(*arguments.paths)
