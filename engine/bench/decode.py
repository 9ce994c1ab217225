"""How fast one step of decoding is, without HTTP: tokens per second per width and batch."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from anybit.engine.assemble import assemble
from anybit.engine.bench.bandwidth import copy_bytes_per_second
from anybit.engine.config import EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.machine import resolve_device
from anybit.engine.precision import Precision
from anybit.engine.types import GenerationRequest, ModelInfo, SamplingParams

_WARM_UP_STEPS = 2


def bench_decode(
    config: EngineConfig,
    bit_widths: Sequence[int],
    batches: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The `bench decode` report of CONTRACT: medians over `rounds` alternating rounds of `steps` decode steps each.

    Every sequence has `context` tokens of prompt in the cache before the clock starts.
    """
    config = replace(config, max_num_seqs=max(batches))
    core, info = assemble(config)
    bandwidth = copy_bytes_per_second(resolve_device(config.device))
    cells = [(width, batch) for width in bit_widths for batch in batches]
    samples: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    for round_index in range(rounds):
        for index, (width, batch) in enumerate(cells):
            samples[width, batch].append(_step_seconds(core, width, batch, context, steps, info.vocab_size))
            progress(round_index * len(cells) + index + 1, rounds * len(cells))
    return {
        "device": f"{platform.machine()} {info.device}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": info.name,
        "copy_gb_per_second": bandwidth / 1e9,
        "rows": [
            _row(info, width, batch, context, statistics.median(samples[width, batch]), bandwidth)
            for width, batch in cells
        ],
    }


def _step_seconds(core: EngineCore, width: int, batch: int, context: int, steps: int, vocab_size: int) -> float:
    """Seconds of one decode step, averaged over `steps`, with `batch` sequences at `width`."""
    generator = torch.Generator().manual_seed(context)
    for index in range(batch):
        prompt = torch.randint(vocab_size, (context,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=steps + _WARM_UP_STEPS + batch + 1, temperature=0)
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
    return seconds


def _row(info: ModelInfo, width: int, batch: int, context: int, seconds: float, bandwidth: float) -> dict[str, Any]:
    weight_bytes = next(entry.bytes_read_per_token for entry in info.widths if entry.bit_width == width)
    moved = weight_bytes + batch * context * info.kv_bytes_per_token
    return {
        "bit_width": width,
        "kv_format": info.kv_format,
        "batch": batch,
        "context": context,
        "tokens_per_second": batch / seconds,
        "step_milliseconds": seconds * 1e3,
        "floor_share": moved / bandwidth / seconds,
        "weight_bytes": weight_bytes,
    }
