"""The log of a whole server, as machines read it."""

import json
import os
import signal
from pathlib import Path

import httpx

from tests.endtoend.command import ServeCommand
from tests.endtoend.test_serving import engine_process, wait_for


def test_every_line_of_server_and_engine_is_an_object(tiny_checkpoint: Path, cache: Path) -> None:
    with ServeCommand(tiny_checkpoint, "--log-format", "json", cache=cache) as server:
        response = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "Hello", "max_tokens": 3, "bit_width": 3, "ignore_eos": True},
            headers={"X-Request-Id": "mine-1"},
            timeout=60,
        )
        assert response.headers["X-Request-Id"] == "mine-1"
        wait_for(lambda: "mine-1" in server.log)
        os.kill(engine_process(server.process.pid), signal.SIGKILL)  # so that something goes wrong, too
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {"anybit.engine", "anybit.server"} <= {line["logger"] for line in lines}
    (started,) = [line for line in lines if "kv_capacity_tokens" in line]
    assert started["url"] == server.url
    (request,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert (request["bit_width"], request["generated_tokens"], request["outcome"]) == ("3", 3, "length")
