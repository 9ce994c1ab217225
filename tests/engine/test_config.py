"""Settings that cannot be met are refused in a sentence; those that can are seen in what the engine says it serves."""

from dataclasses import replace

import pytest
import torch

from anybit.engine import config as config_module
from anybit.engine.assemble import assemble
from anybit.engine.config import ConfigError, EngineConfig
from anybit.engine.errors import AnyBitError
from anybit.engine.kv import cache as kv_cache_module
from anybit.engine.machine import physical_cores, resolve_device
from anybit.engine.types import KVFormatInfo
from anybit.kernels import layout
from anybit.kvcache import spec
from tests.fixtures.engine import make_request, run
from tests.fixtures.sentences import assert_one_sentence


@pytest.fixture
def config(tiny_checkpoint):
    return EngineConfig(str(tiny_checkpoint), "tiny", device="cpu", threads=1, max_num_seqs=2)


def test_a_gpu_serves_more_sequences_and_longer_steps_unless_told():
    config = EngineConfig("", "tiny")
    assert (config.num_seqs("cpu"), config.num_seqs("cuda")) == (16, 128)
    assert (config.step_tokens("cpu"), config.step_tokens("cuda")) == (256, 2048)
    assert replace(config, max_num_seqs=3).num_seqs("cuda") == 3


def test_choices_are_those_of_the_lower_floors():
    """config.py loads no torch, so it repeats them."""
    assert config_module.BIT_WIDTHS == layout.BIT_WIDTHS
    assert config_module.KV_FORMATS == spec.KV_FORMATS


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"bit_widths": (2, 5)}, ("Bit-width 5", "2, 3, 4, 6, 8")),
        ({"default_bit_width": 7}, ("Bit-width 7",)),
        ({"lm_head_bits": 16}, ("Bit-width 16",)),
        ({"bit_widths": (2, 8)}, ("default bit-width 4", "2, 8")),
        ({"device": "tpu"}, ("device", "'tpu'")),
        ({"kv_format": "int4"}, ("KV format", "'int4'")),
        ({"compute_dtype": "float8"}, ("compute dtype", "'float8'")),
        ({"threads": -1}, ("threads is -1", "at least 0")),
        ({"max_num_seqs": -1}, ("max_num_seqs is -1", "at least 0")),
        ({"max_step_tokens": -1}, ("max_step_tokens is -1",)),
        ({"max_model_len": -5}, ("max_model_len is -5",)),
        ({"kv_cache_bytes": -1}, ("kv_cache_bytes is -1",)),
    ],
)
def test_check_refuses_settings_out_of_range(config, changes, parts):
    with pytest.raises(ConfigError) as caught:
        replace(config, **changes).check()
    assert_one_sentence(caught.value, *parts)


def test_check_accepts_the_defaults(config):
    EngineConfig("checkpoint", "name").check()
    config.check()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({"max_model_len": 513}, ("513", "512")), ({"bit_widths": (2, 5), "default_bit_width": 2}, ("Bit-width 5",))],
)
def test_assemble_refuses_what_the_checkpoint_cannot_do(config, changes, parts):
    with pytest.raises(ConfigError) as caught:
        assemble(replace(config, **changes))
    assert_one_sentence(caught.value, *parts)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda")
    assert_one_sentence(caught.value, "no GPU")


def test_assemble_describes_what_it_serves(config):
    core, info = assemble(replace(config, bit_widths=(4, 2), max_model_len=200, lm_head_bits=6, kv_format="float32"))
    assert (info.bit_widths, info.default_bit_width, info.lm_head_bits) == ([2, 4], 4, 6)
    assert (info.name, info.method, info.source) == ("tiny", "rtn", "tiny-llama")
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (512, 200, 2)
    assert info.eos_token_ids == [0, 1]
    # Bytes of keys and values, layers, heads, head_dim; two sequences of 200 tokens, in whole pages.
    assert info.kv_formats == [KVFormatInfo("float32", 2 * 2 * 2 * 16 * 4, 2 * 256)]
    assert (info.compute_dtype, info.reproducible) == ("float32", True)
    assert [width.perplexity for width in info.widths] == [None, None]
    answers = run(core, [make_request(str(width), range(5), 3, width) for width in (2, 4)])
    assert [len(tokens) for tokens in answers.values()] == [3, 3]
    stats = core.take_stats()
    # Prompts and two more tokens each; every step read both widths, and the head once, charged to the larger.
    linears = {width.bit_width: width.bytes_read_per_token for width in info.widths}
    head = linears[4] - stats.weight_bytes_read[2] // 3 - (linears[4] - linears[2])
    assert stats.weight_bytes_read == {2: 3 * (linears[2] - head), 4: 3 * linears[4]}
    assert head == 512 * 64 * 6 // 8 + 3 * 512 * 2


def test_cache_budget_decides_the_pages(config):
    page = 64 * 2 * 2 * 2 * 16 * 2
    _, info = assemble(replace(config, kv_cache_bytes=5 * page + page // 2))
    assert info.kv_formats == [KVFormatInfo("bf16", page / 64, 5 * 64)]
    _, info = assemble(replace(config, kv_cache_bytes=1))
    assert info.kv_formats[0].capacity_tokens == 64  # one page at least: short requests can be served


def test_formats_share_the_cache_in_equal_parts(config):
    page = 64 * 2 * 2 * 2 * 16 * 2
    formats = {"kv_format": "qet4", "kv_formats": ("bf16", "qet2/uniform3")}
    core, info = assemble(replace(config, max_num_seqs=2, max_step_tokens=64, kv_cache_bytes=35 * page, **formats))
    capacity = {kv.name: kv.capacity_tokens for kv in info.kv_formats}
    assert list(capacity) == ["qet4", "bf16", "qet2/uniform3"]
    assert capacity["bf16"] == 10 * 64  # a third of what 5 own pages leave
    assert capacity["qet4"] == capacity["qet2/uniform3"] == 2 * 9 * 64 - 64  # two full contexts need no more
    answers = run(core, [make_request(str(i), range(100), 3, 4, name) for i, name in enumerate([None, *capacity])])
    assert [len(tokens) for tokens in answers.values()] == [3] * 4
    assert answers["0"] == answers["1"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"kv_format": "float32", "kv_formats": ("qet4",)}, ("float32", "beside qet4")),
        ({"kv_format": "qet4/bf16"}, ("qet4/bf16", "mixes")),
        ({"kv_formats": ("qet5",)}, ("'qet5'",)),
    ],
)
def test_formats_that_do_not_go_together_are_refused(config, changes, parts):
    with pytest.raises(ConfigError) as caught:
        assemble(replace(config, **changes))
    assert_one_sentence(caught.value, *parts)


def test_context_that_free_memory_cannot_hold_is_refused(config, monkeypatch):
    monkeypatch.setattr(kv_cache_module, "free_bytes", lambda device: 100_000)
    with pytest.raises(AnyBitError) as caught:
        assemble(config)
    assert_one_sentence(caught.value, "512 tokens", "--max-model-len")


def test_physical_cores_is_at_least_one():
    assert physical_cores() >= 1
