"""What counting costs: processor time per generated token and per scrape, and their share of a server's throughput.

    python -m tests.bench.metrics_cost --tokens-per-second 5850 --json metrics_cost.json

The share is that of one core, as if nothing else could run meanwhile; the engine is another process. An event of a real
server often brings one token, so tokens are counted one by one here.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anybit.server.metrics.exposition import Metrics
from anybit.server.metrics.sequences import Outcome
from tests.server.fake_engine import FakeEngine

TOKENS_PER_REQUEST = 512
SCRAPE_SECONDS = 5.0


def seconds_each(work: Callable[[], None], count: int, rounds: int = 7) -> float:
    """Processor time of one call, the median of some rounds."""
    samples = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(count):
            work()
        samples.append((time.process_time() - started) / count)
    return statistics.median(samples)


def measure(tokens_per_second: float) -> dict[str, Any]:
    engine = FakeEngine()
    metrics = Metrics("tiny", engine, lambda: True)
    for label in map(str, engine.info.bit_widths):
        metrics.width(label)
    width = metrics.width("4")

    def count_request() -> None:
        width.record_scheduled(0.001, 0.02)
        width.record_first_tokens(100, 1, 0.03)
        width.record_end(Outcome.LENGTH, 2.0, 1.9)

    per_token = seconds_each(lambda: width.record_next_tokens(1, 0.004), 100_000)
    per_request = seconds_each(count_request, 20_000)
    per_scrape = seconds_each(lambda: len(metrics.render()) and None, 100)
    counting = (per_token + per_request / TOKENS_PER_REQUEST) * tokens_per_second
    return {
        "tokens_per_second": tokens_per_second,
        "microseconds_per_token": 1e6 * per_token,
        "microseconds_per_request": 1e6 * per_request,
        "milliseconds_per_scrape": 1e3 * per_scrape,
        "share_of_one_core": counting + per_scrape / SCRAPE_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-second", type=float, default=800)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = measure(options.tokens_per_second)
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
