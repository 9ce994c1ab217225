import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anybit.engine.models.decoder import Decoder
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.layout import BIT_WIDTHS
from tests.fixtures.threads import torch_threads
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_all_fixtures() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: Llama, untied, two layers."""
    return save_llama(tiny_llama(), tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_source` quantized for every width. Read only: tests that damage one take `checkpoint_copy`."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    directory.mkdir()
    quantize(HuggingFaceSource(tiny_source), directory, QuantizeOptions())
    return directory


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tiny_gpu_decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A tiny Llama at all widths on a GPU, with heads that its kernels know."""
    model = tiny_llama(hidden_size=192, intermediate_size=320, head_dim=64)
    source = HuggingFaceSource(save_llama(model, tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    config = json.loads((directory / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(directory), BIT_WIDTHS, 8, "cuda"), "cuda")
