"""Eight hours of a request every ten seconds, without the waiting: random arrivals, lengths, widths, formats of keys and
values, departures and shared beginnings, in a cache far too small."""

import gc
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from anybit.engine.core import EngineCore
from anybit.engine.models.decoder import Decoder
from anybit.engine.quantize.run import QuantizeOptions, quantize
from anybit.engine.sequence import Sequence
from anybit.engine.types import FinishReason, GenerationRequest
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import HuggingFaceSource
from anybit.engine.weights.loader import NestedLoader
from anybit.kernels.cpu.bindings import get_threads, set_threads
from anybit.kernels.layout import BIT_WIDTHS
from anybit.kvcache.spec import PAGE_SIZE
from tests.fixtures.engine import make_core, make_request, run
from tests.fixtures.threads import torch_threads
from tests.fixtures.tiny_llama import decoder_of, save_llama, tiny_llama

pytestmark = pytest.mark.slow

NUM_REQUESTS = 8 * 3600 // 10
NUM_KINDS = 80
NUM_PAGES = 8  # of each format: what the longest request of a sealed one needs
MAX_MODEL_LEN = 7 * PAGE_SIZE
MAX_STEPS_WITHOUT_TOKENS = 500
VOCABULARY = range(4, 500)
FORMATS = {
    "native": ("bf16", "qet4", "qet3/qet2", "qet2+2"),
    "portable": ("bf16", "qet4", "qet2/uniform4"),  # of which the native step does not know one
}
SHARE = {"native": 1.0, "portable": 0.1}  # of the requests; a step takes longer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more."""
    before = get_threads()
    set_threads(1)
    with torch_threads(1):
        yield
    set_threads(before)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=32)
    source = HuggingFaceSource(save_llama(model, tmp_path_factory.mktemp("source")))
    directory = tmp_path_factory.mktemp("checkpoint")
    quantize(source, directory, QuantizeOptions(method="rtn"))
    return decoder_of(source.config, NestedLoader(CheckpointReader(directory), BIT_WIDTHS, 8, "cpu"))


def random_kinds(rng: random.Random, kv_formats: tuple[str, ...]) -> Iterator[GenerationRequest]:
    """Requests, some of which begin alike, most of them short; all fit the cache alone."""
    beginnings = [rng.choices(VOCABULARY, k=4 * PAGE_SIZE) for _ in range(4)]
    for number in range(NUM_KINDS):
        shared = rng.choice(beginnings)[: rng.choice((0, 0, 20, 70, 130, 200))]
        prompt = shared + rng.choices(VOCABULARY, k=rng.choice((1, 3, 30, 64, 120)))
        room = MAX_MODEL_LEN - len(prompt)
        sampling = rng.choice(({}, {}, {"temperature": 1.0, "seed": number}, {"temperature": 0.7, "top_k": 20}))
        yield make_request(
            f"kind{number}",
            prompt,
            min(room, rng.choice((1, 2, 8, 20, 60, 100))),
            rng.choice(BIT_WIDTHS),
            rng.choice(kv_formats),
            stop_token_ids=tuple(rng.sample(VOCABULARY, 3)),
            **sampling,
        )


@dataclass
class Soak:
    """Requests arrive in bursts; after each the core must be as it was before the first."""

    core: EngineCore
    rng: random.Random
    kinds: list[GenerationRequest]
    alone: dict[str, list[int]]
    kind_of: dict[str, str] = field(default_factory=dict)
    received: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, FinishReason] = field(default_factory=dict)

    def burst(self, num_requests: int) -> None:
        rate = self.rng.choice((0.02, 0.2, 1.0, 5.0))  # arrivals a step
        share_leaving = self.rng.choice((0.0, 0.01, 0.2))  # a step
        next_arrival = 0.0
        num_steps = steps_without_tokens = 0
        while num_requests or self.core.has_work:
            while num_requests and (next_arrival <= num_steps or not self.core.has_work):
                self.arrive()
                num_requests -= 1
                next_arrival += self.rng.expovariate(rate)
            if self.rng.random() < share_leaving:
                self.leave()
            got_tokens = self.take(self.core.step())
            num_steps += 1
            steps_without_tokens = 0 if got_tokens else steps_without_tokens + 1
            assert steps_without_tokens < MAX_STEPS_WITHOUT_TOKENS, "nobody gets on"

    def arrive(self) -> None:
        kind = self.rng.choice(self.kinds)
        name = f"r{len(self.kind_of)}"
        self.kind_of[name], self.received[name] = kind.request_id, []
        self.take(self.core.add(replace(kind, request_id=name)))

    def leave(self) -> None:
        alive = [name for name in self.received if name not in self.ended]
        if alive:
            self.take(self.core.abort(self.rng.choice(alive)))

    def take(self, events) -> bool:
        for event in events:
            assert event.request_id not in self.ended, "an event after the last"
            self.received[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                self.ended[event.request_id] = event.finish_reason
        return bool(events)

    def check_idle(self) -> None:
        self.core.check_integrity()
        stats = self.core.take_stats()
        assert (sum(stats.running.values()), sum(stats.waiting.values()), stats.kv_pages_used) == (0, 0, 0)
        assert not any(stats.kv_bytes_used.values())
        assert all(stats.kv_bytes_cached[name] <= total for name, total in stats.kv_bytes_total.items())
        assert self.ended.keys() == self.kind_of.keys()
        for name, reason in self.ended.items():
            expected = self.alone[self.kind_of[name]]
            if reason is FinishReason.ABORT:
                assert self.received[name] == expected[: len(self.received[name])]
            else:
                assert reason in (FinishReason.STOP, FinishReason.LENGTH)
                assert self.received[name] == expected
        for told in (self.kind_of, self.received, self.ended):
            told.clear()


@pytest.mark.parametrize("formats", FORMATS)
def test_nothing_is_left_behind_and_every_text_is_what_it_is_alone(decoder: Decoder, formats: str) -> None:
    rng = random.Random(7)
    kv_formats = FORMATS[formats]
    kinds = list(random_kinds(rng, kv_formats))
    limits = {"num_pages": NUM_PAGES, "max_model_len": MAX_MODEL_LEN, "kv_formats": kv_formats[1:]}
    alone_core = make_core(decoder, prefix_cache=False, **limits)
    alone = {name: tokens for kind in kinds for name, tokens in run(alone_core, [kind]).items()}
    core = make_core(decoder, max_num_seqs=12, max_step_tokens=96, **limits)
    soak = Soak(core, rng, kinds, {kind.request_id: alone.get(kind.request_id, []) for kind in kinds})
    left = round(NUM_REQUESTS * SHARE[formats])
    while left:
        size = min(left, rng.choice((1, 5, 30, 120)))
        soak.burst(size)
        soak.check_idle()
        left -= size
    del soak
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Sequence], "a sequence outlives its request"
    counters = core._scheduler.counters
    assert counters.preemptions > 0
    assert counters.prefix_hit_tokens > 0.1 * counters.prefix_queried_tokens
    assert set(counters.sealed_pages) == set(kv_formats[1:])
