"""Reports of `bench serve` as a measurement would make them, without one."""

from collections.abc import Sequence
from typing import Any

from anybit.server.bench.answer import Answer, Failure
from anybit.server.bench.load import Load, LoadResult
from anybit.server.bench.report import Goal, met_up_to, report_row
from anybit.server.bench.run import BenchSettings

CLOSED = tuple(Load("concurrency", number) for number in (1, 4, 16))
OPEN = (Load("request_rate", 0.5), Load("request_rate", 2.0), Load("request_rate", float("inf")))
WIDTHS = (2, 4, 8)
TEXT = "alice_in_wonderland.txt"


def sample_report(
    loads: Sequence[Load] = CLOSED,
    widths: Sequence[int | None] = WIDTHS,
    goal: Goal | None = None,
    failing: Sequence[int] = (),
    **changes: Any,
) -> dict[str, Any]:
    """Of a server of this project that gets slower with bits and load; `failing` are indices of loads at which each
    request of the first width fails."""
    goal = goal or Goal(ttft_ms=100.0)
    rows = [
        report_row(width, [_result(width, index, width == widths[0] and index in failing)], goal) | load.to_json()
        for width in widths
        for index, load in enumerate(loads)
    ]
    known = [width for width in widths if width is not None]
    report = {
        "base_url": "http://127.0.0.1:8000/v1",
        "model": "tiny",
        "server": {"version": "0.1.0", "device": "cpu", "method": "rtn", "kv_format": "bf16", "reproducible": True},
        "machine": "x86_64, 2 CPUs",
        "finished": "2026-01-02T03:04:05+00:00",
        "versions": {"anybit": "0.1.0"},
        "settings": BenchSettings(loads=tuple(loads), goal=goal).to_json() | {"refused_fields": []},
        "rows": rows,
        "slo_met_up_to": met_up_to(rows, goal.share) if goal.is_set else None,
        "resources": {
            "weights_bytes": {"linear": 9 << 20, "norm": 1 << 20},
            "device_memory_bytes": {"weights": 10 << 20, "kv_cache": 3 << 20, "workspace": 0, "free": 1 << 40},
            "widths": [
                {
                    "bit_width": width,
                    "effective_bits": width + 0.44,
                    "equivalent_bytes": width << 20,
                    "bytes_read_per_token": width << 19,
                }
                for width in sorted({*known, 6})
            ],
            "kv_formats": [
                {"kv_format": "bf16", "bytes_per_token": 256.0, "capacity_tokens": 4096},
                {"kv_format": "qet4", "bytes_per_token": 67.5, "capacity_tokens": 16384},
            ],
            "live_quality": [{"bit_width": 2, "tokens": 1234, "kl": 0.75, "top1_agreement": 0.5}],
        },
        "quality": {
            "text": TEXT,
            "tokens": 2046,
            "context": 1024,
            "results": [{"bit_width": width, "perplexity": 100.0 / (width or 1)} for width in widths],
            "note": None,
        },
    }
    return report | changes


def _result(width: int | None, load_index: int, fails: bool) -> LoadResult:
    if fails:
        return LoadResult([Failure("5xx", "broken")] * 10, 2.0, 0.1)
    first = 0.03 * (1 + load_index) * (width or 4) / 2
    gap = 0.001 * (1 + load_index) * (width or 4)
    answers: list[Answer | Failure] = [
        Answer(first * (1 + late / 10), first + 7 * gap, [gap] * 7, 10, 8, width) for late in range(10)
    ]
    return LoadResult(answers, 2.0 * (width or 4), 0.1)
