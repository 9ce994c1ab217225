"""The cache of prepared models: all or nothing, one builder at a time, storage errors told in a sentence."""

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.errors import CheckpointError, SourceError, StorageError
from anybit.engine.kv.key_balance import FILE_NAME, load_key_balance, save_key_balance
from anybit.engine.models.registry import read_config
from anybit.engine.quantize import prepare, run
from anybit.engine.quantize.run import QuantizeOptions
from anybit.engine.weights.cache import building, cache_root, require_free_space, storage_errors
from anybit.engine.weights.description import describe_checkpoint
from anybit.engine.weights.manifest import read_manifest, verify_files
from anybit.engine.weights.resolve import resolve_model
from tests.fixtures.sentences import assert_one_sentence

WIDTHS = (2, 3, 4, 6, 8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("ANYBIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def visible(directory: Path) -> list[str]:
    """What is there besides lock files."""
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def build(destination: Path, content: str = "new") -> None:
    with building(destination) as partial:
        (partial / "file").write_text(content)
        assert not destination.exists() or (destination / "file").read_text() != content


def test_building_publishes_the_whole_directory_at_the_end(tmp_path):
    build(tmp_path / "a" / "b" / "model")
    assert visible(tmp_path / "a" / "b") == ["model"]
    assert (tmp_path / "a" / "b" / "model" / "file").read_text() == "new"


def test_building_replaces_what_was_there_only_at_the_end(tmp_path):
    build(tmp_path / "model", "old")
    build(tmp_path / "model", "new")
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert visible(tmp_path) == ["model"]


def build_half(destination: Path, error: BaseException) -> None:
    with building(destination) as partial:
        (partial / "file").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("half way"), KeyboardInterrupt(), SystemExit(1)])
def test_building_leaves_nothing_when_it_is_broken_off(tmp_path, error):
    with pytest.raises(type(error)):
        build_half(tmp_path / "model", error)
    assert visible(tmp_path) == []


def test_building_keeps_what_was_there_when_it_is_broken_off(tmp_path):
    build(tmp_path / "model", "old")
    with pytest.raises(ValueError, match="half way"):
        build_half(tmp_path / "model", ValueError("half way"))
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert visible(tmp_path) == ["model"]


def test_building_removes_the_remains_of_builds_that_were_killed(tmp_path):
    (tmp_path / ".model.partial-0badf00d").mkdir()
    (tmp_path / ".model.partial-0badf00d" / "shard").write_text("half")
    (tmp_path / ".other.partial-0badf00d").mkdir()
    build(tmp_path / "model")
    assert visible(tmp_path) == [".other.partial-0badf00d", "model"]


def test_building_lets_one_builder_in_at_a_time(tmp_path):
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait()
        with building(tmp_path / "model"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with building(tmp_path / "model") as partial:
        inside.set()
        thread.join(0.1)
        assert partial.is_dir(), "the second builder took the first one's work for remains"
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_in_a_sentence_and_leaves_nothing(tmp_path, number):
    with pytest.raises(StorageError) as caught:
        build_half(tmp_path / "model", OSError(number, os.strerror(number)))
    assert_one_sentence(caught.value, str(tmp_path), "full", "ANYBIT_CACHE_DIR")
    assert visible(tmp_path) == []


def test_folder_that_is_a_file_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        build(tmp_path / "file" / "model")
    assert_one_sentence(caught.value, "file", "ANYBIT_CACHE_DIR")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path, monkeypatch, number):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError) as caught:
        build(tmp_path / "model")
    assert_one_sentence(caught.value, str(tmp_path), os.strerror(number))


def test_other_system_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "absent").read_text()


def test_require_free_space_asks_the_nearest_folder_that_exists(tmp_path):
    require_free_space(tmp_path / "a" / "b", 1)
    with pytest.raises(StorageError) as caught:
        require_free_space(tmp_path / "a" / "b", 1 << 60)
    assert_one_sentence(caught.value, f"{tmp_path} has", "MiB are needed")


def test_cache_root_follows_the_environment(monkeypatch, tmp_path, cache):
    assert cache_root() == cache
    monkeypatch.delenv("ANYBIT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "anybit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "anybit"
    monkeypatch.setenv("ANYBIT_CACHE_DIR", "~/models")
    assert cache_root() == tmp_path / "home" / "models"


def resolve(model, method="rtn", group_size=None, bit_widths=WIDTHS, **more):
    return resolve_model(model, method, group_size, bit_widths, **more)


def test_resolve_of_nothing_is_the_demo(cache):
    wheel, hub = resolve(None), resolve(None, demo_source="hub")
    assert (wheel.name, wheel.source) == ("SmolLM2-135M-Instruct", "demo")
    assert (hub.name, hub.source) == ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert wheel.checkpoint.parent == hub.checkpoint.parent == cache / "checkpoints"
    assert wheel.checkpoint != hub.checkpoint
    assert not wheel.is_prepared


def test_resolve_of_a_checkpoint_is_itself(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint.parent)
    found = resolve(tiny_checkpoint.name)
    assert (found.name, found.checkpoint, found.source) == (tiny_checkpoint.name, tiny_checkpoint.resolve(), "")
    assert found.is_prepared


def test_resolve_of_a_source_is_a_place_in_the_cache(tiny_source, cache, tmp_path):
    directory = resolve(str(tiny_source))
    assert (directory.name, directory.source) == ("tiny-llama", str(tiny_source.resolve()))
    (tmp_path / "some.model.gguf").write_text("")
    file = resolve(str(tmp_path / "some.model.gguf"))
    assert (file.name, file.source) == ("some.model", str(tmp_path.resolve() / "some.model.gguf"))
    assert directory.checkpoint.parent == file.checkpoint.parent == cache / "checkpoints"


def test_resolve_of_a_repository_name(cache):
    found = resolve("some-one/Model_1.5")
    assert (found.name, found.source) == ("Model_1.5", "some-one/Model_1.5")
    assert found.checkpoint.parent == cache / "checkpoints"


@pytest.mark.parametrize("model", ["nowhere", "/no/such/model", "a/b/c", "./model", "../model.gguf"])
def test_resolve_of_nothing_there_is_refused(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        resolve(model)
    assert_one_sentence(caught.value, model)


def test_resolve_keeps_options_and_models_apart(tmp_path):
    sources = [tmp_path / "one" / "model", tmp_path / "two" / "model"]
    for source in sources:
        source.mkdir(parents=True)
        (source / "model.safetensors").write_text("x")
    found = [
        resolve(str(sources[0])),
        resolve(str(sources[1])),
        resolve(str(sources[0]), group_size=32),
        resolve(str(sources[0]), bit_widths=(2, 4)),
        resolve(str(sources[0]), method="other"),
        resolve("one/model"),
    ]
    assert len({model.checkpoint for model in found}) == len(found)
    assert resolve(str(sources[0]), bit_widths=WIDTHS[::-1]).checkpoint == found[0].checkpoint


def test_resolve_notices_another_model_under_the_same_path(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("x")
    before = resolve(str(tmp_path)).checkpoint
    assert resolve(str(tmp_path)).checkpoint == before
    os.utime(path, ns=(1, 1))
    assert resolve(str(tmp_path)).checkpoint != before


def test_prepare_quantizes_measures_and_publishes(tiny_source, tmp_path):
    stages = []
    manifest = prepare.prepare_checkpoint(
        str(tiny_source), tmp_path / "new", QuantizeOptions(bit_widths=(2, 4, 8)), lambda *step: stages.append(step)
    )
    assert read_manifest(tmp_path / "new") == manifest
    verify_files(tmp_path / "new", manifest)
    assert list(manifest.perplexity) == ["float", "2", "4", "8"]
    assert manifest.perplexity_text.startswith("alice_in_wonderland.txt")
    assert [stage for stage, done, total in stages if done == total] == ["quantize", "measure"]
    assert visible(tmp_path) == ["new"]


def test_prepare_balances_keys_on_a_text_where_it_is_asked_to(tiny_source, tmp_path, caplog):
    (tmp_path / "mine.txt").write_text(" ".join(f"word{number}" for number in range(5000)))
    options = QuantizeOptions(bit_widths=(4, 8), kv_calibration=("shipped", str(tmp_path / "mine.txt")))
    stages = []
    manifest = prepare.prepare_checkpoint(
        str(tiny_source), tmp_path / "new", options, lambda *step: stages.append(step)
    )
    assert [stage for stage, done, total in stages if done == total] == ["quantize", "keys", "measure"]
    assert manifest.key_balance is not None
    assert list(manifest.key_balance.texts) == ["shipped", "mine.txt"]
    assert manifest.key_balance.tokens == 16 * 512
    assert describe_checkpoint(tmp_path / "new")["key_balance"]["tokens"] == 16 * 512
    weights = load_key_balance(tmp_path / "new", read_config(tmp_path / "new"))
    assert [weight.shape for weight in weights] == [(2, 16)] * 2
    config = EngineConfig(str(tmp_path / "new"), "tiny", max_num_seqs=1, kv_format="qet4", kv_cache_bytes=1 << 20)
    with caplog.at_level(logging.INFO):
        core, _ = assemble(config)
    assert "the checkpoint's, from 8192 tokens of shipped and mine.txt" in caplog.text
    assert "were estimated" not in caplog.text
    served = [layer.basis.weights for layer in core._runner._pool.sealed["qet4"].layers]
    assert all(torch.equal(*pair) for pair in zip(served, weights, strict=True))


@pytest.mark.parametrize(("text", "part"), [(None, "cannot be read"), ("too short", "fewer than one window")])
def test_prepare_refuses_a_text_for_keys_before_any_work(tiny_source, tmp_path, monkeypatch, text, part):
    if text is not None:
        (tmp_path / "mine.txt").write_text(text)
    monkeypatch.setattr(run, "ShardWriter", None)
    options = QuantizeOptions(bit_widths=(4,), kv_calibration=(str(tmp_path / "mine.txt"),))
    with pytest.raises(SourceError) as caught:
        prepare.prepare_checkpoint(str(tiny_source), tmp_path / "new", options)
    assert_one_sentence(caught.value, part)


@pytest.mark.parametrize("weights", [{}, {0: torch.ones(2, 16), 1: torch.ones(2, 8)}, {0: torch.zeros(2, 16)}, None])
def test_balance_weights_that_are_not_the_models_are_refused(tiny_source, tmp_path, weights):
    if weights is None:
        (tmp_path / FILE_NAME).write_bytes(b"nothing")
    else:
        stored = {0: torch.ones(2, 16), 1: torch.ones(2, 16), **weights} if weights else {}
        save_key_balance(tmp_path, list(stored.values()))
    with pytest.raises(CheckpointError) as caught:
        load_key_balance(tmp_path, read_config(tiny_source))
    assert_one_sentence(caught.value, FILE_NAME, "quantize")


def test_prepare_leaves_nothing_when_a_step_fails(tiny_source, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "quick_perplexity", fail)
    with pytest.raises(StorageError) as caught:
        prepare.prepare_checkpoint(str(tiny_source), tmp_path / "new", QuantizeOptions())
    assert_one_sentence(caught.value, "full")
    assert visible(tmp_path) == []


def test_prepare_never_touches_a_folder_with_something_in_it(tiny_source, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "thesis.txt").write_text("years of work")
    with pytest.raises(SourceError) as caught:
        prepare.prepare_checkpoint(str(tiny_source), tmp_path / "new", QuantizeOptions())
    assert_one_sentence(caught.value, "already exists")
    assert (tmp_path / "new" / "thesis.txt").read_text() == "years of work"
