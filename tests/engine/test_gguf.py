"""GGUF files as source models: names, row order, number formats, and files that cannot be read."""

import functools

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from anybit.engine.errors import SourceError, UnsupportedModelError
from anybit.engine.models.registry import parse_config
from anybit.engine.weights.gguf_source import GGUFSource
from anybit.engine.weights.loader import DenseLoader
from anybit.engine.weights.open_source import open_source
from tests.fixtures.engine import cached_logits
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_gguf import write_gguf
from tests.fixtures.tiny_llama import decoder_of, tiny_llama

TOKENS = list(range(7, 47))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def transformers_logits(model):
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def own_logits(source):
    return cached_logits(decoder_of(source.config, DenseLoader(source)), TOKENS, len(TOKENS))


def test_float32_file_holds_every_tensor_under_its_hugging_face_name(model, path):
    source = GGUFSource(path)
    state = model.state_dict()
    assert sorted(source.tensor_names()) == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(source.tensor(name), tensor), name


def test_rows_of_q_and_k_differ_in_the_file(model, path):
    """Else the test above would not show that the permutation is undone."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, num in (("q", 4), ("k", 2)):
        array = stored[f"blk.0.attn_{name}.weight"]
        weight = model.state_dict()[f"model.layers.0.self_attn.{name}_proj.weight"].numpy()
        assert not np.array_equal(array, weight)
        # llama.cpp rotates neighbours: the second row of the file is the first of the second half of head 0.
        assert np.array_equal(array[1], weight[weight.shape[0] // num // 2])


def test_decoder_over_a_gguf_file_gives_the_logits_of_transformers(model, path):
    assert (own_logits(GGUFSource(path)) - transformers_logits(model)).abs().max() < 1e-4


def test_config_is_the_models(model, path):
    source = GGUFSource(path)
    config = parse_config(source.config)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (512, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
    assert (config.layers[0].rope.theta, config.max_position_embeddings) == (10_000.0, 512)
    assert not config.tie_word_embeddings
    assert source.name == "tiny"
    assert source.location == str(path.resolve())


def test_file_without_a_head_is_a_tied_model(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    source = GGUFSource(write_gguf(model, tmp_path / "tied.gguf"))
    assert source.config["tie_word_embeddings"]
    assert (own_logits(source) - transformers_logits(model)).abs().max() < 1e-4


def half(array):
    return array.astype(np.float16).astype(np.float32)


def blocks_of_q8_0(array):
    """Blocks of 32: a float16 scale d = max|x|/127 and int8 numbers round(x/d)."""
    blocks = array.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    numbers = np.round(blocks / scale)
    return (half(scale) * numbers).reshape(array.shape)


@pytest.mark.parametrize(("kind", "stored"), [(Kind.F16, half), (Kind.Q8_0, blocks_of_q8_0)])
def test_number_formats_are_decoded(model, tmp_path, kind, stored):
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf", kind))
    for name, tensor in model.state_dict().items():
        expected = torch.from_numpy(stored(tensor.numpy())) if tensor.dim() > 1 else tensor
        assert source.tensor(name).dtype == torch.float32
        assert torch.allclose(source.tensor(name), expected, rtol=0, atol=1e-7), name
    assert (source.tensor("lm_head.weight") - model.lm_head.weight).abs().max() < 0.01


@pytest.mark.parametrize(
    ("kind", "error"),
    [(Kind.BF16, 0.005), (Kind.Q4_0, 0.12), (Kind.Q4_1, 0.12), (Kind.Q5_0, 0.06), (Kind.Q5_1, 0.06)],
    ids=lambda value: getattr(value, "name", None),
)
def test_number_formats_are_close_to_what_was_written(model, tmp_path, kind, error):
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf", kind))
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            assert (source.tensor(name) - tensor).norm() < error * tensor.norm(), name


# Super-blocks of 256 numbers: where in a block its float16 scales lie; every other byte may be anything.
SUPER_BLOCKS = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def random_blocks(array, kind):
    """Valid blocks that hold any numbers, where `array` would be encoded: the gguf library cannot encode these kinds."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(array.size)
    blocks = generator.integers(0, 256, (array.size // 256, size), dtype=np.uint8)
    for start in SUPER_BLOCKS[kind]:
        scales = generator.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(array.shape[0], -1)


@pytest.mark.parametrize("kind", SUPER_BLOCKS, ids=lambda kind: kind.name)
def test_super_blocks_are_decoded_to_the_right_tensors(tmp_path, kind):
    model = tiny_llama(hidden_size=256, intermediate_size=256, head_dim=64)
    source = GGUFSource(write_gguf(model, tmp_path / "file.gguf", kind, encode=random_blocks))
    state = {}
    for name, tensor in model.state_dict().items():
        decoded = tensor
        if tensor.dim() > 1:
            decoded = torch.from_numpy(gguf.dequantize(random_blocks(tensor.numpy(), kind), kind))
            assert decoded.std() > 1e-3
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:  # the random rows are those of the file: put them in the model's order
            decoded = decoded.view(heads, 32, 2, 256).transpose(1, 2).reshape(tensor.shape)
        state[name] = decoded
        assert torch.equal(source.tensor(name), decoded), name
    model.load_state_dict(state)
    expected = transformers_logits(model)
    # Random blocks give logits of up to 90, of which float32 itself is 1e-3 away from float64.
    assert (own_logits(source) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_number_format_that_cannot_be_decoded_is_told(model, tmp_path, monkeypatch):
    path = write_gguf(model, tmp_path / "file.gguf")
    source = GGUFSource(path)
    # The library knows this type by its name and cannot decode it.
    decode = functools.partial(gguf.dequantize, qtype=Kind.Q8_K)
    monkeypatch.setattr("anybit.engine.weights.gguf_source.dequantize", lambda data, _: decode(data))
    with pytest.raises(SourceError) as caught:
        source.tensor("lm_head.weight")
    assert_one_sentence(caught.value, "lm_head.weight", "file.gguf")


def test_missing_tensor_is_named(path):
    with pytest.raises(SourceError) as caught:
        GGUFSource(path).tensor("model.layers.7.mlp.up_proj.weight")
    assert_one_sentence(caught.value, "model.layers.7.mlp.up_proj.weight")


def test_other_architecture_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedModelError) as caught:
        open_source(write_gguf(model, tmp_path / "other.gguf", architecture="falcon"))
    assert_one_sentence(caught.value, "'falcon'", "llama")


def test_unknown_tensor_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_tensor("blk.0.attn_qkv.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError) as caught:
        open_source(tmp_path / "file.gguf")
    assert_one_sentence(caught.value, "'blk.0.attn_qkv.weight'")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.5, 0.9, 0.999])
def test_file_cut_short_is_refused_in_a_sentence(path, tmp_path, share):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError) as caught:
        open_source(cut)
    assert_one_sentence(caught.value, "cut.gguf")


@pytest.mark.parametrize("content", [b"not a model at all" * 100, b"GGUF" + bytes(1000), b"GGUF" + b"\xff" * 1000])
def test_file_that_is_no_gguf_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "file.gguf")
    assert_one_sentence(caught.value, "file.gguf")


def test_file_without_a_tokenizer_is_refused_in_a_sentence(path, tmp_path):
    with pytest.raises(SourceError) as caught:
        GGUFSource(path).write_tokenizer(tmp_path)
    assert_one_sentence(caught.value, "tokenizer")
