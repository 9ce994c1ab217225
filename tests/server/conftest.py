from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.server.fake_engine import FakeEngine
from tests.server.live_server import LiveServer
from tests.server.tiny_checkpoint import byte_level_tokenizer, write_checkpoint


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer)


@pytest.fixture(scope="session")
def ending() -> Iterator[list[LiveServer]]:
    """Servers that were asked to stop; waiting for all of them at once saves most of the time."""
    servers: list[LiveServer] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start(checkpoint: Path, ending: list[LiveServer]) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers with settings of the test's choice."""
    servers: list[LiveServer] = []

    def start_server(engine: FakeEngine | None = None, **settings: Any) -> LiveServer:
        servers.append(LiveServer(engine or FakeEngine(), settings.pop("checkpoint", checkpoint), **settings))
        return servers[-1]

    yield start_server
    for server in servers:
        server.ask_to_stop()
    ending += servers


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[LiveServer]:
    """One server with default settings for all tests of a module that leave it as they found it."""
    live = LiveServer(FakeEngine(), checkpoint)
    yield live
    live.stop()
