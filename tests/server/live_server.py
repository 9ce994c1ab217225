"""A real uvicorn in a thread, on a free port, around a FakeEngine."""

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from anybit.engine.replaceable_engine import ReplaceableEngine
from anybit.server.app import build_app
from anybit.server.config import ServerConfig
from anybit.server.upgrade import Upgrade
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until


class LiveServer:
    """Started by the constructor; `stop` ends it and checks that it ended, which takes a while."""

    def __init__(
        self,
        engine: FakeEngine | ReplaceableEngine,
        checkpoint: Path,
        wait: bool = True,
        upgrade: Upgrade | None = None,
        **settings: Any,
    ) -> None:
        self.engine = engine
        self.load_failures: list[Exception] = []
        config = ServerConfig(model_name="tiny", checkpoint_dir=checkpoint, port=0, **settings)
        self.app = build_app(engine, config, self.load_failures.append, upgrade)
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started, "the server did not start")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.port: int = port
        self.url = f"http://127.0.0.1:{port}"
        # Reading certificates that are not needed here takes longer than most tests.
        self.http = httpx.Client(base_url=self.url, timeout=20, verify=False)
        if wait:
            self.wait_ready()

    @cached_property
    def openai(self) -> OpenAI:
        return self.client("unused")

    def client(self, api_key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20, http_client=self.http)

    @property
    def service(self) -> Any:
        return self.app.state.service

    def wait_ready(self) -> None:
        wait_until(lambda: self.service.ready, "the server did not become ready")

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "Hello world", **fields})

    def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Hello"}]
        return self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of one series, None when there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        return None

    def ask_to_stop(self) -> None:
        self.http.close()
        self._server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive(), "the server did not stop"
