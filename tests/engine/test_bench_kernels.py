"""What `bench kernels` reports, on weights too small to say anything about speed."""

import json
import re
from collections.abc import Iterator

import pytest
import torch

from anybit.engine.bench import kernels as bench
from anybit.engine.bench.kernels import Rotation, bench_kernels
from anybit.engine.bench.shapes import DEFAULT_SHAPES, MODEL_SHAPES, Shape, parse_shapes
from anybit.engine.machine import cpu_flags
from anybit.kernels import dispatch
from anybit.kernels.cpu import bandwidth, bindings
from anybit.kernels.cpu.bandwidth import read_bytes_per_second
from anybit.kernels.cpu.packed import PackedWeight
from anybit.kernels.duplicates import duplicates
from tests.fixtures.native import NOT_BUILT
from tests.fixtures.nested import normal, random_nested
from tests.fixtures.sentences import assert_one_sentence

SHAPES = (Shape(24, 64), Shape(40, 96))
WIDTHS = (2, 4, 6)
BATCHES = (1, 3)
FEW_BYTES = 8 << 10


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Copying 256 MiB is no part of what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "copy_bytes_per_second", lambda device: 2e9)
        yield


@pytest.fixture(scope="module")
def report(quick):
    return bench_kernels(SHAPES, WIDTHS, BATCHES, None, 1, 2, rotation_bytes=FEW_BYTES)


@pytest.fixture
def portable(monkeypatch):
    """As if the native library had not been built."""
    monkeypatch.setenv(bindings.VARIABLE, "none")
    bindings.native_library.cache_clear()
    yield
    bindings.native_library.cache_clear()


def tensors_of(weight: dispatch.ServedWeight) -> list[torch.Tensor]:
    if isinstance(weight, PackedWeight):
        return list(weight.tensors)
    parts = [tensor for part in weight.affine.values() for tensor in (part.scale, part.zero)]
    return [*weight.chunks.values(), *parts]


def test_shapes_are_numbers_or_names():
    assert parse_shapes("64x128") == (Shape(64, 128),)
    assert parse_shapes("llama-3-8b, 64x128,4096x4096") == (*MODEL_SHAPES["llama-3-8b"], Shape(64, 128))
    assert set(parse_shapes(DEFAULT_SHAPES)) <= set(MODEL_SHAPES["llama-3-8b"])
    for name, shapes in MODEL_SHAPES.items():
        assert parse_shapes(name) == shapes == parse_shapes(",".join(map(str, shapes)))


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("gpt-5", "'gpt-5' is not a shape"),
        ("", "smollm2-135m"),
        ("64x", "'64x' is not a shape"),
        ("-64x64", "OUTxIN"),
        ("64x64,64x33", "64x33 is not a multiple of 32"),
        ("0x64", "weights"),
        ("999999999x999999968", "weights"),
        ("64x0", "weights"),
    ],
)
def test_wrong_shape_is_one_sentence(text, telling):
    with pytest.raises(ValueError, match=re.escape(telling)) as error:
        parse_shapes(text)
    assert_one_sentence(error.value)


def test_report_has_the_contracted_shape(report):
    assert report.keys() == {
        *("device", "versions", "cpu_flags", "threads", "copy_gb_per_second", "read_gb_per_second", "rows"),
    }
    assert report["threads"] == 1
    assert report["copy_gb_per_second"] == 2
    assert [(row["out"], row["in"], row["bit_width"], row["m"]) for row in report["rows"]] == [
        (shape.out_features, shape.in_features, width, batch)
        for shape in SHAPES
        for width in WIDTHS
        for batch in BATCHES
    ]
    for row in report["rows"]:
        assert row.keys() == {
            *("op", "out", "in", "m", "bit_width", "group_size", "peer", "microseconds", "bytes", "floor_share"),
            *("gb_per_second", "giga_weights_per_second", "rotation_bytes", "fastest_microseconds"),
        }
        assert (row["op"], row["peer"]) == ("linear", None)
        assert row["group_size"] == {64: 64, 96: 32}[row["in"]]
        assert row["rotation_bytes"] >= FEW_BYTES
    json.dumps(report, allow_nan=False)


def test_bytes_rates_and_share_follow_from_the_time(report):
    for row in report["rows"]:
        groups = row["in"] // row["group_size"]
        floats = {2: 2, 4: 2, 6: 3}[row["bit_width"]] * groups * row["out"] * 2
        assert row["bytes"] == row["out"] * row["in"] * row["bit_width"] // 8 + floats
        seconds = row["microseconds"] / 1e6
        assert row["gb_per_second"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert row["giga_weights_per_second"] == pytest.approx(row["out"] * row["in"] / seconds / 1e9)
        assert row["floor_share"] == pytest.approx(row["gb_per_second"] / report["read_gb_per_second"])


def test_group_size_and_progress_are_passed_on(quick):
    seen = []
    report = bench_kernels(SHAPES[:1], (8,), (2,), 32, 1, 3, lambda *state: seen.append(state), FEW_BYTES)
    assert [row["group_size"] for row in report["rows"]] == [32]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_every_round_goes_over_all_cells(quick, monkeypatch):
    order = []

    def call_seconds(self, bit_width, batch, at_least=1.0):
        order.append((bit_width, batch))
        return float(len(order))

    monkeypatch.setattr(Rotation, "call_seconds", call_seconds)
    report = bench_kernels(SHAPES[:1], (2, 8), (1,), None, 1, 3, rotation_bytes=FEW_BYTES)
    assert order == [(2, 1), (8, 1)] * 4
    assert [row["microseconds"] / 1e6 for row in report["rows"]] == [5, 6]  # medians of 3, 5, 7 and of 4, 6, 8
    assert [row["fastest_microseconds"] / 1e6 for row in report["rows"]] == [3, 4]


def test_report_without_native_kernels(quick, portable):
    report = bench_kernels(SHAPES[:1], (3,), (1,), None, 1, 1, rotation_bytes=FEW_BYTES)
    assert "portable" in report["device"]
    assert report["rows"][0]["floor_share"] > 0


def test_rotation_uses_every_copy_in_turn(monkeypatch):
    used = []
    monkeypatch.setattr(dispatch, "linear", lambda x, weight, segments: used.append((id(weight), *segments)))
    rotation = Rotation(Shape(16, 32), 32, (2, 8), 1000)
    copies = rotation.num_copies
    assert copies == 6  # 128 bytes of codes and 64 of floats at 2 bits
    rotation.call_seconds(8, 1, at_least=0)
    rotation.call_seconds(2, 3, at_least=float("inf"))
    assert len(used) == 1 + copies
    assert len({weight for weight, _ in used[:copies]}) == copies
    assert used[copies][0] == used[0][0]
    assert [segment for _, segment in used] == [(8, 0, 1)] + copies * [(2, 0, 3)]


def test_copies_stop_where_memory_does(monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 4000)
    assert 1 < Rotation(Shape(16, 32), 32, (2,), 1 << 30).num_copies <= 2000 // 192
    monkeypatch.setattr(bench, "free_bytes", lambda device: 0)
    assert Rotation(Shape(16, 32), 32, (2,), 1 << 30).num_copies == 1


@pytest.mark.parametrize("widths", [(2,), (3, 8), (2, 3, 4, 6, 8)])
@pytest.mark.parametrize("native", [True, False])
def test_duplicates_are_the_same_weight_elsewhere(native, widths):
    if native and not bindings.is_native():
        pytest.skip(NOT_BUILT)  # test_bindings.py fails where a compiler was at hand
    weight = random_nested(40, 64, 32, widths)
    served = dispatch.prepare(weight) if native else weight
    assert isinstance(served, PackedWeight) == native
    x = normal(2, 64)
    expected = [dispatch.linear(x, served, ((width, 0, 2),)) for width in widths]
    first, second = duplicates(served, 2)
    assert first.nbytes == second.nbytes == served.nbytes
    for overwritten in (served, first):
        for tensor in tensors_of(overwritten):
            tensor.zero_()
    for width, rows in zip(widths, expected, strict=True):
        assert torch.equal(dispatch.linear(x, second, ((width, 0, 2),)), rows)


def test_read_bandwidth_is_the_best_of_the_rounds(monkeypatch):
    assert read_bytes_per_second(1 << 16, 2) > 0
    speeds = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(bandwidth.ReadProbe, "bytes_per_second", lambda self: next(speeds))
    assert read_bytes_per_second(8, 3) == 3


def test_read_bandwidth_without_the_native_library(portable):
    assert read_bytes_per_second(1 << 16, 1) > 0


def test_cpu_flags_are_known_names_without_repetition():
    flags = cpu_flags()
    assert len(set(flags)) == len(flags)
    assert all(flag == flag.lower().strip() for flag in flags)
