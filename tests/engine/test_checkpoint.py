"""From a source model to a checkpoint directory and back: the same weights, only the streams wanted, every byte counted."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anybit.engine.errors import CheckpointError, SourceError, UnsupportedModelError
from anybit.engine.quantize.rtn import quantize_rtn
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.weights import checkpoint as checkpoint_module
from anybit.engine.weights.accounting import (
    bytes_read,
    bytes_resident,
    effective_bits,
    linear_entries,
    vocabulary_entries,
    width_info,
)
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.description import describe_checkpoint
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.engine.weights.manifest import file_sha256, read_manifest, verify_files
from anybit.kernels import layout
from anybit.kernels.reference import dequantize
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

WIDTHS = layout.BIT_WIDTHS
QKV = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
DOWN = ["model.layers.0.mlp.down_proj"]
FUSED = [QKV, DOWN, ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]]


def make_checkpoint(model, directory, options=None):
    """Save, quantize, open."""
    source = HuggingFaceSource(save_llama(model, directory / "source"))
    (directory / "checkpoint").mkdir()
    quantize(source, directory / "checkpoint", options or QuantizeOptions())
    return CheckpointReader(directory / "checkpoint")


def assert_same(one, other):
    assert (one.out_features, one.in_features, one.group_size) == (
        other.out_features,
        other.in_features,
        other.group_size,
    )
    assert one.bit_widths == other.bit_widths
    for name in one.chunks:
        assert torch.equal(one.chunks[name], other.chunks[name])
    for width, part in one.affine.items():
        assert torch.equal(part.scale, other.affine[width].scale)
        assert torch.equal(part.zero, other.affine[width].zero)


@pytest.mark.parametrize("prefixes", FUSED, ids=lambda prefixes: prefixes[0].rsplit(".", 1)[1])
def test_loaded_weights_are_what_the_method_made(tiny_source, tiny_checkpoint, prefixes):
    source = HuggingFaceSource(tiny_source)
    weight = torch.cat([source.tensor(f"{prefix}.weight") for prefix in prefixes])
    loaded = (
        NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8, native=False).linear(prefixes, bias=False).weight
    )
    assert_same(loaded, quantize_rtn(weight, layout.auto_group_size(weight.shape[1]), WIDTHS))


def test_vocabulary_is_loaded_at_its_own_width_only(tiny_source, tiny_checkpoint):
    table = HuggingFaceSource(tiny_source).tensor("model.embed_tokens.weight")
    loaded = NestedLoader(CheckpointReader(tiny_checkpoint), (2,), 4, native=False).vocabulary("model.embed_tokens")
    assert_same(loaded.weight, quantize_rtn(table, 64, (4,)))
    assert torch.equal(loaded.embed(torch.tensor([3, 511])), dequantize(loaded.weight, 4)[[3, 511]])


def test_vectors_are_kept_as_floats(tiny_source, tiny_checkpoint):
    loader = NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8, native=False)
    norm = loader.vector("model.norm.weight")
    assert norm.dtype == torch.float32
    assert torch.equal(norm, HuggingFaceSource(tiny_source).tensor("model.norm.weight"))
    assert loader.resident_bytes["norm"] == norm.nbytes


def test_biases_are_kept_as_floats_and_stacked(tmp_path):
    model = tiny_llama(attention_bias=True)
    loaded = NestedLoader(make_checkpoint(model, tmp_path), WIDTHS, 8).linear(QKV, bias=True)
    attention = model.model.layers[1].self_attn
    assert torch.equal(loaded.bias, torch.cat([getattr(attention, f"{name}_proj").bias for name in "qkv"]))


@pytest.mark.parametrize(
    ("widths", "streams"),
    [((2,), 1), ((2, 3), 2), ((3,), 2), ((2, 3, 4), 3), ((6,), 4), ((2, 6), 4), ((8,), 5), (WIDTHS, 5)],
)
def test_loading_some_widths_keeps_only_their_streams(tiny_checkpoint, widths, streams):
    loader = NestedLoader(CheckpointReader(tiny_checkpoint), widths, 8, native=False)
    weight = loader.linear(DOWN, bias=False).weight
    assert list(weight.chunks) == ["c2", "c3", "c4", "c6", "c8"][:streams]
    # 64 · 96 weights in groups of 32; the float parts of 4 bits come along for s_4.
    assert sum(chunk.nbytes for chunk in weight.chunks.values()) == 64 * 96 * max(widths) // 8
    assert set(weight.affine) == set(widths) | ({4} if max(widths) > 4 else set())
    assert loader.resident_bytes["linear"] == weight.nbytes


def test_loading_four_bits_needs_no_stream_of_the_low_nibble(checkpoint_copy):
    (shard,) = checkpoint_copy.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if not name.endswith((".c6", ".c8"))}  # noqa: SIM118
    save_file(kept, shard)
    loaded = NestedLoader(CheckpointReader(checkpoint_copy), (2, 3, 4), 4, native=False).linear(QKV, bias=False)
    assert loaded.weight.bit_widths == (2, 3, 4)


@pytest.mark.parametrize("widths", [(2,), (4,), (2, 3, 4), (6,), (8,), WIDTHS])
def test_accounting_agrees_with_the_loaded_weights(tiny_checkpoint, widths):
    reader = CheckpointReader(tiny_checkpoint)
    loader = NestedLoader(reader, widths, 6, native=False)
    decoder = decoder_of(json.loads((tiny_checkpoint / "config.json").read_text()), loader)
    linears = [
        linear.weight
        for layer in decoder.layers
        for linear in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
    ]
    entries = linear_entries(reader.manifest)
    for width in widths:
        assert bytes_read(entries, width) == sum(weight.bytes_read(width) for weight in linears)
    assert bytes_resident(entries, widths) == sum(weight.nbytes for weight in linears)
    assert bytes_resident(entries, widths) == loader.resident_bytes["linear"]
    tables = vocabulary_entries(reader.manifest)
    assert bytes_resident(tables, (6,)) == loader.resident_bytes["embedding"]
    assert bytes_read(tables[-1:], 6) == decoder.head.weight.bytes_read(6)


@pytest.mark.parametrize(("group_size", "options"), [(32, QuantizeOptions(group_size=32)), (64, QuantizeOptions())])
def test_effective_bits_count_the_float_parts(tmp_path, group_size, options):
    reader = make_checkpoint(tiny_llama(intermediate_size=64), tmp_path, options)
    assert {entry.group_size for entry in reader.manifest.tensors.values()} == {group_size}
    for width in WIDTHS:
        expected = width + (32 if width <= 4 else 48) / group_size
        assert effective_bits(linear_entries(reader.manifest), width) == pytest.approx(expected)
        assert effective_bits(vocabulary_entries(reader.manifest), width) == pytest.approx(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_width_info_counts_the_head_once_a_token_and_the_table_once_in_memory(tmp_path, tied):
    manifest = make_checkpoint(tiny_llama(tie_word_embeddings=tied), tmp_path).manifest
    info = width_info(manifest, 3, 8)
    linears, tables = linear_entries(manifest), vocabulary_entries(manifest)
    table_bytes = 512 * 64 * 1 + 3 * 512 * 2
    assert len(tables) == (1 if tied else 2)
    assert bytes_read(tables, 8) == table_bytes * len(tables)
    assert info.bytes_read_per_token == bytes_read(linears, 3) + table_bytes
    assert info.equivalent_bytes == bytes_read(linears, 3) + table_bytes * len(tables)
    assert info.effective_bits == effective_bits(linears, 3)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in (*linears, *tables))
    assert info.effective_bits_with_head == pytest.approx(8 * info.equivalent_bytes / weights)


def test_manifest_tells_how_the_checkpoint_was_made(tiny_source, tiny_checkpoint):
    manifest = read_manifest(tiny_checkpoint)
    verify_files(tiny_checkpoint, manifest)
    assert manifest.bit_widths == WIDTHS
    assert (manifest.method, manifest.decoder, manifest.group_size) == ("rtn", "affine", "auto")
    assert manifest.source_name == "tiny-llama"
    assert manifest.source_sha256 == file_sha256(tiny_source / "model.safetensors")
    assert set(manifest.files) == {path.name for path in tiny_checkpoint.iterdir()} - {"anybit.json"}
    assert "tokenizer.json" in manifest.files
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "anybit", "bits": list(WIDTHS)}
    assert config["hidden_size"] == 64


def test_checkpoint_holds_no_float_copy_of_a_quantized_weight(tiny_checkpoint):
    (shard,) = tiny_checkpoint.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        names = set(file.keys())
    quantized = set(read_manifest(tiny_checkpoint).tensors)
    assert len(quantized) == 2 * 7 + 2
    assert not names & quantized
    dense = {name for name in names if not any(name.startswith(f"{weight}.") for weight in quantized)}
    assert dense == {"model.norm.weight"} | {
        f"model.layers.{layer}.{norm}.weight"
        for layer in (0, 1)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_several_shards_hold_the_same_checkpoint(tiny_source, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_SHARD_BYTES", 20_000)
    quantize(HuggingFaceSource(tiny_source), tmp_path, QuantizeOptions())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    verify_files(tmp_path, read_manifest(tmp_path))
    one, many = (NestedLoader(CheckpointReader(path), WIDTHS, 8, native=False) for path in (tiny_checkpoint, tmp_path))
    assert_same(one.linear(QKV, bias=False).weight, many.linear(QKV, bias=False).weight)


def test_describe_checkpoint_counts_what_serving_all_widths_takes(tiny_checkpoint):
    described = describe_checkpoint(tiny_checkpoint)
    loader = NestedLoader(CheckpointReader(tiny_checkpoint), WIDTHS, 8, native=False)
    decoder_of(json.loads((tiny_checkpoint / "config.json").read_text()), loader)
    assert described["resident_bytes"] == loader.resident_bytes["linear"] + loader.resident_bytes["embedding"]
    assert [row["bit_width"] for row in described["widths"]] == list(WIDTHS)
    assert described["file_bytes"] == sum(path.stat().st_size for path in tiny_checkpoint.iterdir())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_source_with_a_weight_that_is_not_finite_is_refused(tmp_path, bad):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(UnsupportedModelError) as caught:
        make_checkpoint(model, tmp_path)
    assert_one_sentence(caught.value, "model.layers.1.mlp.up_proj.weight", "not finite")


def test_source_whose_sizes_no_group_divides_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError) as caught:
        make_checkpoint(tiny_llama(intermediate_size=80), tmp_path)
    assert_one_sentence(caught.value, "down_proj", "80")


def test_source_that_lacks_a_weight_is_refused(tmp_path):
    directory = save_llama(tiny_llama(), tmp_path / "source")
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if "layers.1.mlp.up_proj" not in name}  # noqa: SIM118
    save_file(kept, directory / "model.safetensors")
    with pytest.raises(SourceError) as caught:
        quantize(HuggingFaceSource(directory), tmp_path, QuantizeOptions())
    assert_one_sentence(caught.value, "model.layers.1.mlp.up_proj.weight")


def test_weights_of_rows_that_cannot_be_stacked_are_refused_in_a_sentence(tmp_path):
    reader = make_checkpoint(tiny_llama(num_attention_heads=8, head_dim=12, num_key_value_heads=1), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        NestedLoader(reader, WIDTHS, 8, native=False).linear(QKV, bias=False)
    assert_one_sentence(caught.value, "multiples of 8")


def test_fused_weights_of_unlike_range_can_be_served(tmp_path):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data *= 1e-3
    reader = make_checkpoint(model, tmp_path)
    weight = NestedLoader(reader, WIDTHS, 8, native=False).linear(QKV, bias=False).weight
    attention = model.model.layers[1].self_attn
    value = attention.v_proj.weight
    error = (dequantize(weight, 8)[-value.shape[0] :] - value).square().sum() / value.square().sum()
    assert error < 1e-3
