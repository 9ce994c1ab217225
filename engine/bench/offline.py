"""How fast whole requests are answered without HTTP and without processes: what a server's overhead is measured against."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.precision import Precision
from anybit.engine.types import GenerationRequest, ModelInfo, SamplingParams, TokenEvent
from anybit.engine.warm_up import WarmUp


@dataclass(slots=True)
class OfflineAnswer:
    """What became of one request: when each of its tokens came, in seconds since it was sent, or why it failed."""

    num_prompt_tokens: int
    sent_at: float
    moments: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """`seconds` from the first request to the last answer, and how many of them this process computed."""

    answers: list[OfflineAnswer]
    seconds: float
    cpu_seconds: float


def warm_core(config: EngineConfig) -> tuple[EngineCore, ModelInfo]:
    """An engine that has prepared all that a server's does before and between requests."""
    core, model = assemble(config)
    warm_up = WarmUp(core, model)
    warm_up.before_serving()
    while warm_up.has_more:
        warm_up.capture_next()
    return core, model


def keep_in_flight(
    core: EngineCore,
    prompts: Sequence[Sequence[int]],
    bit_width: int,
    max_tokens: int,
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> OfflineResult:
    """Answer all prompts greedily, past any end of text, `concurrency` at a time: the next begins when one has ended."""
    answers: list[OfflineAnswer] = []
    in_flight: dict[str, OfflineAnswer] = {}
    sampling = SamplingParams(max_tokens, temperature=0)

    def send(index: int) -> list[TokenEvent]:
        request_id, prompt = f"bench-{index}", list(prompts[index])
        in_flight[request_id] = OfflineAnswer(len(prompt), time.perf_counter())
        answers.append(in_flight[request_id])
        return core.add(GenerationRequest(request_id, prompt, sampling, Precision(bit_width)))

    started, cpu_started = time.perf_counter(), time.process_time()
    events: list[TokenEvent] = []
    while in_flight or len(answers) < len(prompts):
        while len(in_flight) < concurrency and len(answers) < len(prompts):
            events += send(len(answers))
        if not events:
            events = core.step()
        now = time.perf_counter()
        for event in events:
            answer = in_flight[event.request_id]
            answer.moments += [now - answer.sent_at] * len(event.token_ids)
            if event.finish_reason is not None:
                answer.error = event.error
                del in_flight[event.request_id]
                done()
        events = []
    return OfflineResult(answers, time.perf_counter() - started, time.process_time() - cpu_started)
