"""What crosses the process border arrives as it was sent."""

import socket
import threading

import pytest

from anybit.engine.config import EngineConfig
from anybit.engine.logs import LogSettings
from anybit.engine.messages import (
    FRAME_HEADER,
    Abort,
    AbortAll,
    EngineChannel,
    Events,
    Failed,
    Generate,
    Heartbeat,
    Ready,
    Start,
    decode_from_engine,
    encode_frame,
)
from anybit.engine.precision import Precision
from anybit.engine.types import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    KVFormatInfo,
    ModelInfo,
    SamplingParams,
    TokenEvent,
    WidthInfo,
)

REQUEST = GenerationRequest(
    "id-ä",
    [1, 2**31],
    SamplingParams(7, 0.5, 0.9, 40, logit_bias={5: -1.5}, seed=2**63 - 1, stop_token_ids=(3, 4)),
    Precision(6),
)
INFO = ModelInfo(
    name="tiny",
    checkpoint="/path",
    checkpoint_hash="ab",
    method="rtn",
    source="s",
    widths=[WidthInfo(2, 2.5, 3.0, 10, 20), WidthInfo(4, 4.5, 5.0, 30, 40, perplexity=12.5)],
    default_bit_width=4,
    lm_head_bits=8,
    max_model_len=512,
    max_num_seqs=4,
    vocab_size=512,
    eos_token_ids=[0, 1],
    weights_bytes={"linear": 5},
    kv_formats=[KVFormatInfo("bf16", 64.0, 640)],
    device="cpu",
    compute_dtype="float32",
    reproducible=True,
    load_seconds=1.5,
)
TO_ENGINE = [
    Start(EngineConfig("/path", "name", bit_widths=(2, 4), kv_cache_bytes=1 << 40), LogSettings("DEBUG", "json")),
    Generate(REQUEST),
    Abort("id-ä"),
    AbortAll(),
]
FROM_ENGINE = [
    Ready(INFO),
    Failed("One sentence."),
    Events([TokenEvent("a", [5], None, queue_seconds=0.1), TokenEvent("b", [], FinishReason.ERROR, "No.")]),
    Heartbeat(EngineStats({4: 1}, {2: 3}, 10, 4, steps=9, step_tokens=[1, 2], weight_bytes_read={4: 10**12})),
]


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        theirs.settimeout(5)
        yield ours, EngineChannel(theirs)


def name_of(message: object) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", TO_ENGINE, ids=name_of)
def test_messages_to_the_engine_arrive_as_sent(pair, message):
    ours, channel = pair
    ours.sendall(encode_frame(message))
    assert channel.receive() == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=name_of)
def test_messages_from_the_engine_arrive_as_sent(pair, message):
    ours, channel = pair
    channel.send(message)
    frame = ours.recv(1 << 16)
    (size,) = FRAME_HEADER.unpack(frame[: FRAME_HEADER.size])
    assert size == len(frame) - FRAME_HEADER.size
    assert decode_from_engine(frame[FRAME_HEADER.size :]) == message


def test_messages_in_pieces_and_in_a_row_arrive_in_order(pair):
    ours, channel = pair
    stream = b"".join(map(encode_frame, TO_ENGINE))

    def trickle() -> None:
        for start in range(0, len(stream), 7):
            ours.sendall(stream[start : start + 7])

    thread = threading.Thread(target=trickle)
    thread.start()
    assert [channel.receive() for _ in TO_ENGINE] == TO_ENGINE
    thread.join()


def test_long_prompt_arrives_whole(pair):
    ours, channel = pair
    request = GenerationRequest("a", list(range(500_000)), SamplingParams(1), Precision(2))
    thread = threading.Thread(target=ours.sendall, args=(encode_frame(Generate(request)),))
    thread.start()
    assert channel.receive() == Generate(request)
    thread.join()


@pytest.mark.parametrize("sent", [0, 2, 10])
def test_connection_that_ends_is_the_end_of_messages(pair, sent):
    ours, channel = pair
    ours.sendall(encode_frame(Abort("a long enough name"))[:sent])
    ours.close()
    assert channel.receive() is None
