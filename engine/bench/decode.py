"""How fast one step of decoding is, without HTTP: tokens per second per width and batch."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.bench.subject import DecodeSubject
from anybit.engine.precision import Precision
from anybit.engine.types import GenerationRequest, SamplingParams

_WARM_UP_STEPS = 2


def bench_decode(
    subjects: Sequence[tuple[DecodeSubject, Sequence[int]]],
    batches: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The `bench decode` report of CONTRACT: medians over `rounds` alternating rounds of `steps` decode steps each.

    `subjects` come with the widths to measure, no width twice. Every sequence has `context` tokens of prompt in the cache
    before the clock starts.
    """
    subject = subjects[0][0]
    bandwidth = copy_bytes_per_second(subject.device)
    of_width = {width: subject for subject, bit_widths in subjects for width in bit_widths}
    cells = [(width, batch) for width in of_width for batch in batches]
    samples: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    for round_index in range(rounds):
        for index, (width, batch) in enumerate(cells):
            samples[width, batch].append(_step_seconds(of_width[width], width, batch, context, steps))
            progress(round_index * len(cells) + index + 1, rounds * len(cells))
    return {
        "device": f"{platform.machine()} {subject.device_name}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": subject.name,
        "copy_gb_per_second": bandwidth / 1e9,
        "rows": [
            _row(of_width[width], width, batch, context, statistics.median(samples[width, batch]), bandwidth)
            for width, batch in cells
        ],
    }


def _step_seconds(subject: DecodeSubject, width: int, batch: int, context: int, steps: int) -> float:
    """Seconds of one decode step, averaged over `steps`, with `batch` sequences at `width`.

    The first sequences go on while the prompts of the last are computed, so none has an end in sight.
    """
    core = subject.core
    generator = torch.Generator().manual_seed(context)
    for index in range(batch):
        prompt = torch.randint(subject.vocab_size, (context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=subject.max_model_len - context, temperature=0)
        core.add(GenerationRequest(f"bench-{index}", prompt, sampling, Precision(width)))
    started: set[str] = set()
    while len(started) < batch:
        started |= {event.request_id for event in core.step()}
    for _ in range(_WARM_UP_STEPS):
        core.step()
    begin = time.perf_counter()
    for _ in range(steps):
        core.step()
    seconds = (time.perf_counter() - begin) / steps
    core.abort_all()
    while core.has_work:  # what had begun already
        core.step()
    return seconds


def _row(
    subject: DecodeSubject, width: int, batch: int, context: int, seconds: float, bandwidth: float
) -> dict[str, Any]:
    weight_bytes = subject.weight_bytes[width]
    moved = weight_bytes + batch * context * subject.kv_bytes_per_token
    return {
        "bit_width": width,
        "kv_format": subject.kv_format,
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / seconds,
        "step_milliseconds": seconds * 1e3,
        "floor_share": moved / bandwidth / seconds,
        "weight_bytes": weight_bytes,
    }
