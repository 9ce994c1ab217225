"""Damaged and foreign files: the right error class and one sentence, whatever is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.errors import CheckpointError, SourceError
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.description import describe_checkpoint
from anybit.engine.weights.manifest import read_manifest, verify_files
from anybit.engine.weights.open_source import open_source
from tests.fixtures.sentences import assert_one_sentence
from tests.fixtures.tiny_llama import save_llama, tiny_config, tiny_llama

FILES = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, edit) -> None:
    """Rewrite the one shard of a checkpoint as `edit` of its tensors, and give it a valid hash."""
    (shard,) = directory.glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(edit(tensors), shard)
    rehash(directory)


def rehash(directory: Path) -> None:
    from anybit.engine.weights.manifest import file_sha256

    edit_json(
        directory / "anybit.json",
        files={path.name: file_sha256(path) for path in directory.iterdir() if path.name != "anybit.json"},
    )


def serve(directory: Path) -> None:
    assemble(EngineConfig(checkpoint=str(directory), model_name="tiny", threads=1, device="cpu"))


def assert_refused(directory: Path, *parts: str) -> None:
    """Both ways to look into a checkpoint refuse it in one sentence."""
    for look in (serve, describe_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            look(directory)
        assert_one_sentence(caught.value, *parts)


def assert_not_served(directory: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        serve(directory)
    assert_one_sentence(caught.value, *parts)


def test_the_files_of_a_checkpoint_are_the_ones_damaged_below(tiny_checkpoint):
    assert sorted(path.name for path in tiny_checkpoint.iterdir()) == ["anybit.json", *FILES]
    serve(tiny_checkpoint)


@pytest.mark.parametrize("position", [0, -1, 0.5])
@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_noticed(checkpoint_copy, name, position):
    path = checkpoint_copy / name
    flip_byte(path, int(path.stat().st_size * position) if position == 0.5 else position)
    with pytest.raises(CheckpointError) as caught:
        verify_files(checkpoint_copy, read_manifest(checkpoint_copy))
    assert_one_sentence(caught.value, name, "SHA-256")


def test_flipped_byte_is_noticed_before_anything_is_read(checkpoint_copy):
    path = checkpoint_copy / FILES[2]
    flip_byte(path, path.stat().st_size // 2)
    assert_refused(checkpoint_copy, FILES[2], "SHA-256")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(checkpoint_copy, name):
    (checkpoint_copy / name).unlink()
    assert_refused(checkpoint_copy, str(checkpoint_copy))
    with pytest.raises(CheckpointError) as caught:
        verify_files(checkpoint_copy, read_manifest(checkpoint_copy))
    assert_one_sentence(caught.value, name)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_manifest_cut_short_is_refused(checkpoint_copy, share):
    path = checkpoint_copy / "anybit.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_refused(checkpoint_copy, "anybit.json")


@pytest.mark.parametrize("content", [b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b"{}", b'{"format_version": 1}'])
def test_manifest_of_other_content_is_refused(checkpoint_copy, content):
    (checkpoint_copy / "anybit.json").write_bytes(content)
    assert_refused(checkpoint_copy, str(checkpoint_copy))


def test_directory_without_a_manifest_is_no_checkpoint(tmp_path):
    assert_refused(tmp_path, str(tmp_path), "anybit.json")
    assert_refused(tmp_path / "absent", str(tmp_path / "absent"), "anybit.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_format_version_is_refused(checkpoint_copy, version):
    edit_json(checkpoint_copy / "anybit.json", format_version=version)
    assert_refused(checkpoint_copy, f"version {version}", "reads version 1")


def test_unknown_decoder_is_refused(checkpoint_copy):
    edit_json(checkpoint_copy / "anybit.json", decoder="cubic")
    assert_refused(checkpoint_copy, "'cubic'")


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [64, 64], "group_size": 64, "float_dtype": "int4"},
        {"shape": [64, 64], "group_size": 0, "float_dtype": "float16"},
        {"shape": [64, 64], "group_size": 48, "float_dtype": "float16"},
        {"shape": [64, -64], "group_size": 64, "float_dtype": "float16"},
        {"shape": [64], "group_size": 64, "float_dtype": "float16"},
        {"shape": [64, 64], "group_size": "64", "float_dtype": "float16"},
        {"shape": [64, 64], "group_size": 64},
    ],
    ids=["dtype", "no group", "odd group", "negative", "vector", "text", "lacking"],
)
def test_manifest_entry_that_makes_no_sense_is_refused(checkpoint_copy, entry):
    path = checkpoint_copy / "anybit.json"
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_json(path, tensors={**json.loads(path.read_text())["tensors"], name: entry})
    assert_refused(checkpoint_copy)


@pytest.mark.parametrize("widths", [[], [5], [2, 9], [0], ["2"]])
def test_manifest_widths_that_do_not_exist_are_refused(checkpoint_copy, widths):
    edit_json(checkpoint_copy / "anybit.json", bit_widths=widths)
    assert_refused(checkpoint_copy)


def test_weight_that_the_manifest_lacks_is_named(checkpoint_copy):
    path = checkpoint_copy / "anybit.json"
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = json.loads(path.read_text())["tensors"]
    del tensors[name]
    edit_json(path, tensors=tensors)
    assert_not_served(checkpoint_copy, name)


def test_tensor_that_the_shard_lacks_is_named(checkpoint_copy):
    name = "model.layers.1.mlp.down_proj.weight.scale_3"
    edit_tensors(checkpoint_copy, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    assert_not_served(checkpoint_copy, name)


def test_tensor_that_the_index_lacks_is_named(checkpoint_copy):
    path = checkpoint_copy / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    edit_json(path, weight_map=weight_map)
    rehash(checkpoint_copy)
    assert_not_served(checkpoint_copy, "model.norm.weight")


def test_tensor_of_another_shape_is_named(checkpoint_copy):
    name = "model.layers.1.mlp.down_proj.weight.c2"
    edit_tensors(checkpoint_copy, lambda tensors: {**tensors, name: torch.zeros(8, 96, dtype=torch.uint8)})
    assert_not_served(checkpoint_copy, name, "(8, 96)", "(16, 96)")


@pytest.mark.parametrize(
    ("name", "content"), [(FILES[2], b""), (FILES[2], b"x" * 100), (FILES[3], b"{}"), (FILES[3], b"[")]
)
def test_shard_or_index_that_is_no_such_thing_is_refused(checkpoint_copy, name, content):
    (checkpoint_copy / name).write_bytes(content)
    rehash(checkpoint_copy)
    assert_not_served(checkpoint_copy, str(checkpoint_copy))


@pytest.mark.parametrize("content", ["", "{", "[]", '"llama"'])
def test_config_that_is_no_object_is_refused(checkpoint_copy, content):
    (checkpoint_copy / "config.json").write_text(content)
    rehash(checkpoint_copy)
    assert_not_served(checkpoint_copy, "config.json")


def test_reader_names_an_unknown_weight(tiny_checkpoint):
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tiny_checkpoint).entry("lm_tail.weight")
    assert_one_sentence(caught.value, "lm_tail.weight")


def assert_no_source(path: Path, *parts: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert_one_sentence(caught.value, *parts)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickle_file_is_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_no_source(path, path.name, "pickle", "safetensors")


def test_directory_of_pickle_files_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(tiny_config().to_json_string())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_no_source(tmp_path, "pickle", "safetensors")


def test_path_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert_no_source(tmp_path / "absent", "absent")
    assert_no_source(tmp_path / "notes.txt", "notes.txt")
    assert_no_source(tmp_path, "no safetensors")


@pytest.fixture
def source(tmp_path):
    return save_llama(tiny_llama(), tmp_path / "source")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\x00"])
def test_source_with_a_broken_config_is_refused(source, content):
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    assert_no_source(source, "config.json")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.5, 0.9999])
def test_source_with_safetensors_cut_short_is_refused(source, share):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert_no_source(source, str(source))


def test_source_that_lacks_a_shard_of_its_index_is_refused(tmp_path):
    directory = save_llama(tiny_llama(), tmp_path / "source", max_shard_size="100KB")
    gone = sorted(directory.glob("*.safetensors"))[1]
    name = next(
        key
        for key, shard in json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].items()
        if shard == gone.name
    )
    gone.unlink()
    with pytest.raises(SourceError) as caught:
        open_source(directory).tensor(name)
    assert_one_sentence(caught.value, gone.name)


def test_source_without_a_usable_tokenizer_is_refused(source, tmp_path):
    (source / "tokenizer.json").unlink()
    with pytest.raises(SourceError) as caught:
        open_source(source).write_tokenizer(tmp_path)
    assert_one_sentence(caught.value, "tokenizer", str(source))
