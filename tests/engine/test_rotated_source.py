"""The rotated source of the quality benchmarks: other weights, the same function."""

import pytest
import torch

from anybit.engine.errors import SourceError
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import DenseLoader
from tests.bench.quality_sources import HEAD, ReplacedSource, RotatedSource, linear_names, write_hugging_face
from tests.fixtures.engine import cached_logits
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

TOKENS = list(range(3, 83))


def logits(source):
    return cached_logits(decoder_of(source.config, DenseLoader(source)), TOKENS, 70)


@pytest.fixture(
    params=[{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=["tied", "untied, biases"]
)
def source(request, tmp_path):
    return HuggingFaceSource(save_llama(tiny_llama(**request.param), tmp_path / "model"))


def test_rotated_weights_compute_the_same_function(source):
    rotated = RotatedSource(source)
    expected = logits(source)
    assert expected.abs().max() > 1
    assert (logits(rotated) - expected).abs().max() < 1e-3
    for name in linear_names(source):
        assert not torch.allclose(rotated.tensor(name), source.tensor(name), atol=0.1), name
    for name in source.tensor_names():
        if "norm" in name:
            assert torch.equal(rotated.tensor(name), torch.ones_like(source.tensor(name)))


def test_the_seed_decides_the_rotation(source):
    name = linear_names(source)[0]
    assert torch.equal(RotatedSource(source, 1).tensor(name), RotatedSource(source, 1).tensor(name))
    assert not torch.allclose(RotatedSource(source, 1).tensor(name), RotatedSource(source, 2).tensor(name))
    assert len({source.sha256(), RotatedSource(source, 1).sha256(), RotatedSource(source, 2).sha256()}) == 3


def test_a_written_directory_is_the_same_model(source, tmp_path):
    rotated = RotatedSource(source)
    write_hugging_face(rotated, tmp_path / "written")
    written = HuggingFaceSource(tmp_path / "written")
    assert sorted(written.tensor_names()) == sorted(rotated.tensor_names())
    assert HEAD in written.tensor_names()
    assert torch.equal(logits(written), logits(rotated))
    assert (tmp_path / "written" / "tokenizer.json").is_file()


def test_replaced_tensors_are_read_instead(source):
    name = linear_names(source)[0]
    replaced = ReplacedSource(source, {name: torch.zeros_like(source.tensor(name))})
    assert not replaced.tensor(name).any()
    others = [other for other in source.tensor_names() if other != name]
    assert all(torch.equal(replaced.tensor(other), source.tensor(other)) for other in others)
    with pytest.raises(SourceError, match="no tensor"):
        ReplacedSource(source, {"absent": torch.zeros(1)})
