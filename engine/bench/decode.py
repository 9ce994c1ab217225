"""How fast one step of decoding is, without HTTP: tokens per second per width and batch."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.bench.subject import DecodeSubject
from anybit.engine.precision import Precision
from anybit.engine.types import GenerationRequest, SamplingParams

_WARM_UP_STEPS = 2

Widths = tuple[int, ...]
"""Of a batch's sequences, in turn."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Of one decode step: seconds, and the bytes of weights that were counted."""

    seconds: float
    weight_bytes: float


def bench_decode(
    subjects: Sequence[tuple[DecodeSubject, Sequence[Widths]]],
    batches: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The `bench decode` report of CONTRACT: medians over `rounds` alternating rounds of `steps` decode steps each.

    `subjects` come with the widths to measure, none twice; where a batch has several, its row names them as "2+4+8". Every
    sequence has `context` tokens of prompt in the cache before the clock starts.
    """
    bandwidth = copy_bytes_per_second(subjects[0][0].device)
    cells = [(subject, widths, batch) for subject, measured in subjects for widths in measured for batch in batches]
    samples: list[list[StepCost]] = [[] for _ in cells]
    for round_index in range(rounds):
        for index, (subject, widths, batch) in enumerate(cells):
            samples[index].append(_step_cost(subject, widths, batch, context, steps))
            progress(round_index * len(cells) + index + 1, rounds * len(cells))
    subject = subjects[0][0]
    return {
        "device": f"{platform.machine()} {subject.device_name}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": subject.name,
        "copy_gb_per_second": bandwidth / 1e9,
        "rows": [_row(*cell, context, costs, bandwidth) for cell, costs in zip(cells, samples, strict=True)],
    }


def _step_cost(subject: DecodeSubject, widths: Widths, batch: int, context: int, steps: int) -> StepCost:
    """The average over `steps` decode steps with `batch` sequences.

    The first sequences go on while the prompts of the last are computed, so none has an end in sight.
    """
    core = subject.core
    generator = torch.Generator().manual_seed(context)
    for index in range(batch):
        prompt = torch.randint(subject.vocab_size, (context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=subject.max_model_len - context, temperature=0)
        core.add(GenerationRequest(f"bench-{index}", prompt, sampling, Precision(widths[index % len(widths)])))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in core.step()}
    for _ in range(_WARM_UP_STEPS):
        core.step()
    read = core.weight_bytes_read
    begin = time.perf_counter()
    for _ in range(steps):
        core.step()
    cost = StepCost((time.perf_counter() - begin) / steps, (core.weight_bytes_read - read) / steps)
    core.abort_all()
    while core.has_work:  # what had begun already
        core.step()
    return cost


def _row(
    subject: DecodeSubject,
    widths: Widths,
    batch: int,
    context: int,
    costs: Sequence[StepCost],
    bandwidth: float,
) -> dict[str, Any]:
    seconds = statistics.median(cost.seconds for cost in costs)
    weight_bytes = round(costs[0].weight_bytes)
    moved = weight_bytes + batch * context * subject.kv_bytes_per_token
    return {
        "bit_width": widths[0] if len(widths) == 1 else "+".join(map(str, widths)),
        "kv_format": subject.kv_format,
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / seconds,
        "step_milliseconds": seconds * 1e3,
        "floor_share": moved / bandwidth / seconds,
        "weight_bytes": weight_bytes,
    }
