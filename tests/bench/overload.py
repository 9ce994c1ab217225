"""Five times as many clients as the server has room for: what is accepted finishes, the rest is refused at once.

anybit serve --max-num-seqs 4 --max-queued-requests 8 &
python tests/bench/overload.py --clients 60 --seconds 30 --json overload.json
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def run(options: argparse.Namespace) -> dict[str, object]:
    body = {"prompt": "Once upon a time", "max_tokens": options.max_tokens, "temperature": 0, "ignore_eos": True}
    statuses: Counter[int] = Counter()
    texts: set[str] = set()
    refusal_seconds: list[float] = []
    without_retry_after = 0
    memory: list[float] = []
    deadline = time.perf_counter() + options.seconds

    async def ask_again_and_again() -> None:
        nonlocal without_retry_after
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            response = await client.post("/v1/completions", json=body)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                texts.add(response.json()["choices"][0]["text"])
            else:
                refusal_seconds.append(time.perf_counter() - started)
                without_retry_after += "retry-after" not in response.headers
                await asyncio.sleep(options.pause)

    async def watch_memory() -> None:
        while time.perf_counter() < deadline:
            text = (await client.get("/metrics")).text
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
            memory.append(
                sum(
                    sample.value
                    for sample in samples
                    if sample.name in ("anybit_engine_resident_bytes", "process_resident_memory_bytes")
                )
            )
            await asyncio.sleep(0.5)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.base_url, timeout=600, limits=limits) as client:
        await asyncio.gather(watch_memory(), *(ask_again_and_again() for _ in range(options.clients)))
    settled = memory[len(memory) // 4 :]
    return {
        "clients": options.clients,
        "statuses": dict(statuses),
        "different_texts": len(texts),
        "refused_without_retry_after": without_retry_after,
        "refusal_milliseconds": {
            "median": 1e3 * statistics.median(refusal_seconds),
            "max": 1e3 * max(refusal_seconds),
        },
        "memory_mib": {"after_a_quarter": settled[0] / 2**20, "end": settled[-1] / 2**20, "max": max(memory) / 2**20},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--pause", type=float, default=0.2, help="what a refused client waits before it asks again")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(run(options))
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
