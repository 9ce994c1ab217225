from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endtoend.command import ServeCommand, run_anybit
from tests.fixtures.tiny_llama import save_llama, tiny_llama


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(intermediate_size=128, tie_word_embeddings=True)  # two group sizes: 64 inputs, and 128
    return save_llama(model, tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by `anybit quantize`."""
    destination = tmp_path_factory.mktemp("checkpoints") / "tiny"
    result = run_anybit("quantize", tiny_source, destination, "--method", "rtn", cache=cache)
    assert result.returncode == 0, result.stderr
    return destination


@pytest.fixture(scope="module")
def tiny_server(tiny_checkpoint: Path, cache: Path) -> Iterator[ServeCommand]:
    with ServeCommand(tiny_checkpoint, cache=cache) as server:
        yield server
