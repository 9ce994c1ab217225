"""The decode measurement on a model of random weights, too small to say anything about speed."""

import pytest
import typer

from anybit.engine.bench.decode import bench_decode
from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.bench.random_model import UNQUANTIZED, random_subject
from anybit.engine.config import EngineConfig
from anybit.engine.models.config import DecoderConfig, LayerConfig, Rope
from anybit.server.commands.bench import _check_shape

TINY = DecoderConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    layers=(LayerConfig(Rope(1e4)),) * 2,
    qk_norm=True,
    attention_bias=True,
)


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    config = EngineConfig("", "tiny", bit_widths=(2, 4, 8), lm_head_bits=8, max_num_seqs=3, device="cpu", threads=1)
    return random_subject("tiny", config, 200)


def test_a_report_has_a_row_for_each_width_and_batch(subject):
    report = bench_decode([(subject, [(2,), (8,)])], (1, 3), context=20, steps=3, rounds=2)
    assert [(row["bit_width"], row["batch"]) for row in report["rows"]] == [(2, 1), (2, 3), (8, 1), (8, 3)]
    assert all(row["tokens_per_second"] > 0 and row["context"] == 20 for row in report["rows"])
    assert report["shape"] == "tiny, random weights"
    assert subject.core.take_stats().kv_pages_used == 0


def test_a_batch_of_several_widths_reads_what_was_counted(subject):
    report = bench_decode([(subject, [(2,), (8,), (2, 8)])], (2,), context=20, steps=3, rounds=1)
    narrow, wide, mixed = report["rows"]
    assert mixed["bit_width"] == "2+8"
    assert narrow["weight_bytes"] == subject.weight_bytes[2]
    assert wide["weight_bytes"] == subject.weight_bytes[8]
    # On a processor each width reads its own weights, and the head is read once.
    head = 304 * 128 * (1 + 2 * 4 / 128)
    assert narrow["weight_bytes"] + wide["weight_bytes"] - mixed["weight_bytes"] == pytest.approx(head, rel=0.03)


def test_unquantized_weights_are_measured_beside_nested_ones(subject):
    config = EngineConfig("", "tiny", bit_widths=(UNQUANTIZED,), max_num_seqs=3, device="cpu", threads=1)
    of_floats = random_subject("tiny", config, 200)
    report = bench_decode([(subject, [(4,)]), (of_floats, [(UNQUANTIZED,)])], (2,), context=20, steps=2, rounds=1)
    nested, dense = report["rows"]
    assert (nested["bit_width"], dense["bit_width"]) == (4, UNQUANTIZED)
    linears = TINY.num_layers * (128 * (256 + 128) + 3 * 128 * 256)
    assert dense["weight_bytes"] == 2 * (linears + 300 * 128)


def test_the_bytes_of_a_step_are_those_of_its_width_and_the_head(subject):
    linears = TINY.num_layers * (128 * (256 + 128) + 3 * 128 * 256)
    floats = 4 / 128  # a scale and a zero in half precision, groups of 128
    head = 304 * 128 * (1 + 2 * floats)  # rows are padded to whole vectors; 8 bits read the 4-bit scale too
    for width, parts in ((2, 1), (4, 1), (8, 1.5)):
        expected = linears * (width / 8 + parts * floats) + head
        assert subject.weight_bytes[width] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (("llama-3.1-8b", False, None), "go together"),
        ((None, True, None), "go together"),
        (("llama-3.1-8b", True, "demo"), "not both"),
        (("gpt-2", True, None), "'gpt-2' is not one of llama-3.1-8b"),
    ],
)
def test_wrong_usage_of_shapes_is_told_in_one_sentence(arguments, telling):
    with pytest.raises(typer.BadParameter, match=telling):
        _check_shape(*arguments)
    _check_shape("qwen3-4b", True, None)
    _check_shape(None, False, "demo")
