"""What HTTP costs: the same requests through the engine's client alone and through a server, in alternating rounds.

    python tests/bench/http_overhead.py --streams 8 --json http_overhead.json

The server runs in this process's event loop thread of its own, over the same engine, and streams to an HTTP client.
"""

import argparse
import asyncio
import json
import statistics
import time
import uuid
from pathlib import Path

import httpx
import uvicorn

from anybit.engine.config import EngineConfig
from anybit.engine.logs import LogSettings
from anybit.engine.precision import Precision
from anybit.engine.process_client import ProcessEngine
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.engine.weights.resolve import resolve_model
from anybit.server.app import build_app
from anybit.server.config import ServerConfig


async def through_client(engine: ProcessEngine, prompt: list[int], width: int, tokens: int) -> int:
    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    request = GenerationRequest(uuid.uuid4().hex, prompt, sampling, Precision(width))
    return sum([len(event.token_ids) async for event in engine.generate(request)])


async def through_http(client: httpx.AsyncClient, prompt: list[int], width: int, tokens: int) -> int:
    body = {"prompt": prompt, "bit_width": width, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if '"completion_tokens"' in line:
                count = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    return count


async def measure(options: argparse.Namespace) -> dict[str, object]:
    resolved = resolve_model(None, "rtn", None, (2, 3, 4, 6, 8))
    if not resolved.is_prepared:
        raise SystemExit("Run `anybit inspect` first; it prepares the demo model.")
    engine = ProcessEngine(EngineConfig(str(resolved.checkpoint), resolved.name), logs=LogSettings("WARNING"))
    await engine.start()
    app = build_app(engine, ServerConfig(resolved.name, resolved.checkpoint, port=0))
    server = uvicorn.Server(uvicorn.Config(app, port=options.port, log_level="warning", access_log=False))
    serving = asyncio.create_task(server.serve())
    info = await engine.wait_ready()
    prompts = [
        [(7 * index + 13 * stream) % info.vocab_size for index in range(24)] for stream in range(options.streams)
    ]
    speeds: dict[str, list[float]] = {"engine": [], "http": []}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{options.port}", timeout=600) as client:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.1)
        for round_index in range(options.rounds + 1):
            for way, samples in speeds.items():
                started = time.perf_counter()
                if way == "engine":
                    jobs = [through_client(engine, prompt, options.width, options.max_tokens) for prompt in prompts]
                else:
                    jobs = [through_http(client, prompt, options.width, options.max_tokens) for prompt in prompts]
                counts = await asyncio.gather(*jobs)
                if round_index:  # the first round warms up
                    samples.append(sum(counts) / (time.perf_counter() - started))
    server.should_exit = True
    await serving
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    pairs = [http / alone for http, alone in zip(speeds["http"], speeds["engine"], strict=True)]
    return {
        "streams": options.streams,
        "bit_width": options.width,
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "engine_tokens_per_second": medians["engine"],
        "http_tokens_per_second": medians["http"],
        "cost_of_http": 1 - statistics.median(pairs),
        "device": info.device,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(measure(options))
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
