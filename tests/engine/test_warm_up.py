"""What is prepared before requests wait for it: which steps, in which order, when, and that answers stay what they are."""

import dataclasses
import json
import logging
import socket
import threading
import time

import pytest

from anybit.engine import decode_graphs, process
from anybit.engine.compile_ahead import mixed_steps
from anybit.engine.decode_graphs import MAX_SHAPES, DecodeGraphs
from anybit.engine.messages import FRAME_HEADER, EngineChannel, Events, Generate, decode_from_engine, encode_frame
from anybit.engine.step_inputs import StepShape
from anybit.engine.types import KVFormatInfo
from anybit.engine.warm_up import MOST_SHAPES, WarmUp, first_requests, likely_shapes
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.cuda import compiler, driver
from tests.fixtures.engine import make_core, make_request, run
from tests.fixtures.tiny_llama import decoder_of
from tests.server.fake_engine import model_info


def served(**changes):
    """Widths 2, 4 and 8, of which 4 is the default, in bf16."""
    info = model_info()
    widths = [width for width in info.widths if width.bit_width in (2, 4, 8)]
    return dataclasses.replace(info, **{"widths": widths, "max_num_seqs": 128, "max_model_len": 8192, **changes})


def test_few_rows_of_the_default_width_come_first():
    shapes = likely_shapes(served())
    first = [(shape.num_rows, shape.has_draws) for shape in shapes[:12]]
    assert first == [(rows, has_draws) for rows in (1, 2, 4, 8, 16, 32) for has_draws in (False, True)]
    assert all((shape.widths, shape.table_pages) == ((4,), 8) for shape in shapes[:12])
    assert all(shape.kv_formats == ("bf16",) for shape in shapes)


def test_what_is_unusual_in_two_ways_comes_after_what_is_in_one():
    shapes = likely_shapes(served())
    ordered = [(32, 4, 8), (1, 4, 32), (32, 4, 32), (64, 4, 8), (1, 2, 8), (1, 8, 8), (1, 4, 128), (2, 2, 8), (8, 8, 8)]
    places = [shapes.index(StepShape(rows, (width,), pages)) for rows, width, pages in ordered]
    assert places == sorted(places)
    assert StepShape(128, (8,), 128) not in shapes


def test_likely_shapes_leave_room_for_others():
    shapes = likely_shapes(served())
    assert len(set(shapes)) == len(shapes) == MOST_SHAPES < MAX_SHAPES


@pytest.mark.parametrize(
    ("changes", "rows", "pages"),
    [
        ({"max_num_seqs": 3, "max_model_len": 100}, {1, 2, 4}, {8}),
        ({"max_num_seqs": 1, "max_model_len": 513}, {1}, {8, 32}),
        ({"max_num_seqs": 1, "max_model_len": 512}, {1}, {8}),
        ({"max_num_seqs": 1, "max_model_len": 512, "kv_formats": [KVFormatInfo("qet4", 17.5, 8192)]}, {1}, {8, 32}),
        ({"max_num_seqs": 20, "max_model_len": 100}, {1, 2, 4, 8, 16, 32}, {8}),
        ({"max_num_seqs": 36, "max_model_len": 100}, {1, 2, 4, 8, 16, 32, 48}, {8}),
    ],
)
def test_no_shape_is_larger_than_what_the_server_admits(changes, rows, pages):
    shapes = likely_shapes(served(**changes))
    assert {shape.num_rows for shape in shapes} == rows
    assert {shape.table_pages for shape in shapes} == pages


def test_first_requests_are_longer_at_the_default_width_and_fit_the_context():
    asked = [
        (request.precision.bit_width, len(request.prompt_token_ids), request.sampling.temperature)
        for request in first_requests(served())
    ]
    assert asked == [(4, 32, 0), (4, 64, 0), (4, 128, 0), (4, 512, 0), (4, 32, 1), (2, 128, 0), (8, 128, 0)]
    for length in (5, 70):
        requests = first_requests(served(max_model_len=length))
        assert {request.precision.bit_width for request in requests} == {2, 4, 8}
        assert all(len(request.prompt_token_ids) + request.sampling.max_tokens <= length for request in requests)
    assert first_requests(served(max_model_len=4)) == []


class CapturingCore:
    """Knows how to capture, and nothing else."""

    captures_steps = True

    def __init__(self, present=(), failing=None):
        self.captured = []
        self._present = present
        self._failing = failing

    def capture(self, shape):
        if shape == self._failing:
            raise RuntimeError("out of memory")
        if shape in self._present:
            return False
        self.captured.append(shape)
        return True


def test_one_step_is_captured_at_a_time_and_the_end_is_told_once(caplog):
    model = served(max_num_seqs=2, max_model_len=100)
    shapes = likely_shapes(model)
    core = CapturingCore(present=shapes[:2])
    warm_up = WarmUp(core, model)
    with caplog.at_level(logging.INFO, "anybit.engine"):
        for count in range(1, len(shapes) - 1):
            assert warm_up.has_more
            warm_up.capture_next()
            assert core.captured == shapes[2 : 2 + count]
        assert not warm_up.has_more
        warm_up.capture_next()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"Captured {len(shapes) - 2} likely decode steps in ")


def test_a_capture_that_fails_is_the_last(caplog):
    model = served()
    shapes = likely_shapes(model)
    core = CapturingCore(failing=shapes[2])
    warm_up = WarmUp(core, model)
    for _ in range(3):
        warm_up.capture_next()
    assert core.captured == shapes[:2]
    assert not warm_up.has_more
    assert "was not captured" in caplog.text


@pytest.fixture(scope="module")
def cpu_decoder(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    return decoder_of(config, NestedLoader(CheckpointReader(tiny_checkpoint), (2, 4, 8), 8))


def test_a_processor_prepares_nothing(cpu_decoder):
    core = make_core(cpu_decoder)
    warm_up = WarmUp(core, served())
    assert not warm_up.has_more
    warm_up.before_serving()
    warm_up.capture_next()
    stats = core.take_stats()
    assert (stats.steps, stats.weight_bytes_read, stats.kv_bytes_cached) == (0, {}, {"bf16": 0})


@pytest.mark.parametrize("kv_format", ["bf16", "qet4"])
def test_a_core_apart_answers_alike_and_leaves_nothing(cpu_decoder, kv_format):
    core = make_core(cpu_decoder, kv_format=kv_format)
    request = make_request("a", range(10, 150), 6)
    answer = run(core.apart(), [request])
    stats = core.take_stats()
    assert (stats.steps, stats.weight_bytes_read, stats.sealed_pages) == (0, {}, {})
    assert stats.kv_bytes_cached == {kv_format: 0}
    assert run(core, [request]) == answer
    assert core.take_stats().prefix_hit_tokens == 0


class SlowWarmUp:
    """Takes its time, and remembers when."""

    def __init__(self, core, pieces):
        self._core = core
        self._pieces = pieces
        self.moments = []

    @property
    def has_more(self):
        return len(self.moments) < self._pieces

    def capture_next(self):
        assert not self._core.has_work
        if self.has_more:
            self.moments.append(time.monotonic())
            time.sleep(0.05)


def receive(connection):
    def read(size):
        return connection.recv(size, socket.MSG_WAITALL)

    (size,) = FRAME_HEADER.unpack(read(FRAME_HEADER.size))
    return decode_from_engine(read(size))


def test_warm_up_goes_on_while_idle_and_stops_for_messages(cpu_decoder, monkeypatch):
    monkeypatch.setattr(process, "_QUIET_SECONDS", 0.03)
    core = make_core(cpu_decoder)
    warm_up = SlowWarmUp(core, pieces=12)
    ours, theirs = socket.socketpair()
    engine = threading.Thread(target=process._serve, args=(core, EngineChannel(theirs), warm_up))
    with ours, theirs:
        engine.start()
        while len(warm_up.moments) < 3:
            time.sleep(0.001)
        sent = time.monotonic()
        ours.sendall(encode_frame(Generate(make_request("a", range(10, 50), 40))))
        num_tokens = 0
        while num_tokens < 40:
            message = receive(ours)
            if isinstance(message, Events):
                num_tokens += sum(len(event.token_ids) for event in message.events)
        answered = time.monotonic()
        while warm_up.has_more:
            time.sleep(0.001)
        ours.shutdown(socket.SHUT_RDWR)
        engine.join(5)
        assert not engine.is_alive()
    # One may just be beginning, and one more if the thread that receives was late.
    assert sum(sent < moment < answered for moment in warm_up.moments) <= 2


class FakeStep:
    def __init__(self, shape, *others):
        self.shape = shape


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(decode_graphs, "_CapturedStep", FakeStep)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20, 100))
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._steps = {}
    graphs._pool = graphs._memory = graphs._logits = None
    graphs._decoder = type("Decoder", (), {"device": "cuda"})
    return graphs


def shape_of(number):
    return StepShape(1, (4,), 8 * number)


def test_captured_ahead_are_forgotten_before_used_ones_and_push_none_out(graphs):
    used = graphs._captured(shape_of(1))
    assert not graphs.capture(shape_of(1))
    assert all(graphs.capture(shape_of(number)) for number in range(2, MAX_SHAPES + 1))
    assert not graphs.capture(shape_of(MAX_SHAPES + 1))
    assert graphs._captured(shape_of(1)) is used
    needed = graphs._captured(shape_of(2))  # now used as well
    for number in range(1000, 1000 + MAX_SHAPES - 2):
        graphs._captured(shape_of(number))
    assert len(graphs._steps) == MAX_SHAPES
    assert graphs._captured(shape_of(1)) is used
    assert graphs._captured(shape_of(2)) is needed


def test_nothing_is_captured_ahead_when_memory_is_short(graphs, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4, 100))
    assert not graphs.capture(shape_of(1))
    assert graphs._steps == {}


def served_on_gpu(kv_format):
    return served(max_num_seqs=8, max_model_len=512, vocab_size=500, kv_formats=[KVFormatInfo(kv_format, 64, 4096)])


def mixed_requests():
    return [
        make_request(str(index), range(index + 5, index + 5 + length), 30, width, temperature=index % 2, seed=index)
        for index, (width, length) in enumerate([(4, 30), (4, 150), (2, 100), (4, 64), (8, 7), (4, 1)])
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", ["bf16", "qet4"])
def test_answers_after_a_warm_up_are_those_without_and_no_page_is_touched(tiny_gpu_decoder, kv_format):
    requests = mixed_requests()
    expected = run(make_core(tiny_gpu_decoder, kv_format=kv_format), requests)

    core = make_core(tiny_gpu_decoder, kv_format=kv_format)
    warm_up = WarmUp(core, served_on_gpu(kv_format))
    warm_up.before_serving()
    stats = core.take_stats()
    assert (stats.steps, stats.weight_bytes_read, stats.kv_pages_used) == (0, {}, 0)
    assert run(core, requests) == expected
    while warm_up.has_more:
        warm_up.capture_next()
    hits = core.take_stats().prefix_hit_tokens
    assert run(core, requests) == expected  # from pages that were there during the captures
    assert core.take_stats().prefix_hit_tokens > hits


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", ["bf16", "qet4"])
def test_every_likely_step_is_captured_once_and_none_again(tiny_gpu_decoder, kv_format, monkeypatch):
    captured = []

    class Counted(decode_graphs._CapturedStep):
        def __init__(self, shape, *others):
            captured.append(shape)
            super().__init__(shape, *others)

    monkeypatch.setattr(decode_graphs, "_CapturedStep", Counted)
    core = make_core(tiny_gpu_decoder, kv_format=kv_format)
    model = served_on_gpu(kv_format)
    warm_up = WarmUp(core, model)
    warm_up.before_serving()
    assert {shape.widths for shape in captured} == {(2,), (4,), (8,)}
    while warm_up.has_more:
        warm_up.capture_next()
    shapes = likely_shapes(model)
    assert len(captured) == len(set(captured))
    assert set(captured) >= set(shapes)
    assert {shape.num_rows for shape in captured} == {1, 2, 4, 8}

    before = len(captured)
    drawn = {"temperature": 0.5}
    run(core, [make_request(str(n), range(5, 40 + n), 20, 4, **(drawn if n else {})) for n in range(8)])
    run(core, [make_request(str(n), range(5, 30), 20, 8) for n in range(3)])
    assert len(captured) == before


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", ["bf16", "qet4"])
def test_steps_of_several_widths_find_their_products_compiled(tiny_gpu_decoder, kv_format, monkeypatch, tmp_path):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    for cached in (driver._compile, driver._load):  # what other tests have compiled counts as little as other starts
        cached.cache_clear()
    core = make_core(tiny_gpu_decoder, kv_format=kv_format)
    for widths, num_rows in mixed_steps(served_on_gpu(kv_format)):
        core.compile_mixed(widths, num_rows)
    compiled, compile_source = [], compiler.compile_source

    def recorded(name, architecture, defines):
        compiled.append((name, defines))
        return compile_source(name, architecture, defines)

    monkeypatch.setattr(compiler, "compile_source", recorded)
    run(core, [dataclasses.replace(request, prompt_token_ids=[5, 6, 7]) for request in mixed_requests()])
    assert compiled  # those of one width, for the prompts
    assert not [name for name, defines in compiled if {"WIDTHS", "OWN_PASSES"} & defines.keys()]
