"""llama.cpp's speed (the package `xllamacpp`, its native server) beside AnyBit's, in alternating rounds on the same machine.

    pip install xllamacpp
    python tests/bench/llama_cpp_peer.py --threads 2 --json llama_cpp_peer.json

The peer may live in an environment of its own: `--peer-python` is its interpreter. Both load the demo's GGUF file, the
peer as it is, AnyBit as quantized from it. Prompts are random tokens, never the same twice.

- single: one sequence, prompt then answer. AnyBit without HTTP, llama.cpp by its own clock, which leaves HTTP out too.
- streams: that many OpenAI completions at once, from the same client to the server of each, both processes of their own.

A ratio is the median over the rounds of one run against the other in the same round. Threads of both engines wait for each
other in a loop, so that a neighbour on the same cores costs llama.cpp up to 99 % of its speed: what others compute,
idle servers included, is measured with every sample (`other_cores`). A sample waits for quiet, is measured again if it was
disturbed all the same, and does not count if it still was.
"""

import argparse
import asyncio
import json
import platform
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from llama_cpp_processes import OtherLoad, ServerProcess, start_anybit, start_llama_cpp, wait_until_quiet
from llama_cpp_report import PEER, build_report, print_report

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.machine import physical_cores
from anybit.engine.precision import Precision
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.engine.weights.resolve import resolve_model
from anybit.server.bench.answer import Answer
from anybit.server.bench.client import BenchClient, http_client
from anybit.server.bench.load import closed_loop
from anybit.server.version import anybit_version

WARM_UP_TOKENS = 8
ATTEMPTS = 2
MIXED_WIDTHS = (2, 4, 8)
STREAM_WIDTHS: dict[str, tuple[int, ...]] = {"4": (4,), "8": (8,), "2+4+8": MIXED_WIDTHS}

Sample = dict[str, Any]
Measure = Callable[[int], Sample]
"""Takes the number of tokens to generate."""


def random_prompt(length: int) -> list[int]:
    return random.choices(range(1000, 40000), k=length)


def single_llama_cpp(address: str, server: ServerProcess, context: int, generated: int) -> Sample:
    body = {"prompt": random_prompt(context), "n_predict": generated, "ignore_eos": True, "temperature": 0}
    load = OtherLoad(server)
    response = httpx.post(f"{address}/completion", json=body | {"cache_prompt": False}, timeout=600)
    other_cores = load.cores()
    timings = response.raise_for_status().json()["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (context, generated):
        raise RuntimeError(f"llama.cpp computed another number of tokens than asked for: {timings}")
    return {
        "prompt_tokens_per_second": timings["prompt_per_second"],
        "decode_tokens_per_second": timings["predicted_per_second"],
        "other_cores": other_cores,
    }


def single_anybit(core: EngineCore, width: int, context: int, generated: int) -> Sample:
    sampling = SamplingParams(max_tokens=generated, temperature=0)
    request = GenerationRequest("bench", random_prompt(context), sampling, Precision(width))
    load = OtherLoad()
    started = time.perf_counter()
    events = core.add(request)
    while not events:
        events = core.step()
    first = time.perf_counter()
    count = len(events[-1].token_ids)
    while core.has_work:
        events = core.step()
        count += sum(len(event.token_ids) for event in events)
    ended = time.perf_counter()
    if count != generated:
        raise RuntimeError(f"The engine generated {count} tokens instead of {generated}: {events}")
    return {
        "prompt_tokens_per_second": context / (first - started),
        # The first token is the prompt's; llama.cpp counts in the same way.
        "decode_tokens_per_second": (generated - 1) / (ended - first),
        "other_cores": load.cores(),
    }


async def ask_streams(address: str, widths: list[int | None], prompt_tokens: int, generated: int) -> Sample:
    """One request per entry of `widths`, all at once."""
    pending = list(zip([random_prompt(prompt_tokens) for _ in widths], widths, strict=True))
    async with http_client(address, None) as http:
        client = BenchClient(http, f"{address}/v1", "SmolLM2-135M-Instruct", "completions", generated, 600)

        async def ask(request: Any) -> Any:
            return await client.ask(*request)

        result = await closed_loop(ask, pending, len(pending), lambda: None)  # type: ignore[arg-type]
    answers = [outcome for outcome in result.outcomes if isinstance(outcome, Answer)]
    if [answer.generated_tokens for answer in answers] != [generated] * len(widths):
        raise RuntimeError(f"Not every stream was answered with {generated} tokens: {result.outcomes}"[:1000])
    return {
        "seconds": result.seconds,
        "tokens_per_second": generated * len(widths) / result.seconds,
        "first_token_seconds": statistics.median(answer.first_token for answer in answers),
        "client_cpu_seconds": result.client_cpu_seconds,
    }


def streams(
    address: str, server: ServerProcess, widths: list[int | None], prompt_tokens: int, generated: int
) -> Sample:
    load = OtherLoad(server)
    sample = asyncio.run(ask_streams(address, widths, prompt_tokens, generated))
    return sample | {"other_cores": load.cores()}


def measure_in_quiet(measure: Measure, generated: int, options: argparse.Namespace) -> Sample:
    """The first sample that nothing disturbed, or the last one."""
    sample: Sample = {}
    for _ in range(ATTEMPTS):
        wait_until_quiet(options.quiet_cores, options.patience)
        sample = measure(generated)
        sample["disturbed"] = sample["other_cores"] > options.quiet_cores
        if not sample["disturbed"]:
            break
    return sample


def run_rounds(
    measures: dict[tuple[str, str], Measure],
    options: argparse.Namespace,
    save: Callable[[list[Sample], list[str]], None],
) -> tuple[list[Sample], list[str]]:
    """Everything once per round after a shorter one to warm up; what fails costs its own sample and no other."""
    samples: list[Sample] = []
    failures: list[str] = []
    for round_index in range(options.rounds + 1):
        for (part, case), measure in measures.items():
            try:
                if round_index == 0:
                    measure(WARM_UP_TOKENS)
                    continue
                sample = measure_in_quiet(measure, options.generated, options)
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{part}, {case}, round {round_index}: {error}")
                continue
            samples.append({"part": part, "case": case, "round": round_index, **sample})
            print(json.dumps(samples[-1]), flush=True)
        save(samples, failures)
    return samples, failures


def collect_measures(
    stack: ExitStack, options: argparse.Namespace, versions: dict[str, Any]
) -> dict[tuple[str, str], Measure]:
    """Start what is measured; the order is that of a round. Fills `versions` with what was started."""
    resolved = resolve_model(None, "rtn", None, (2, 3, 4, 6, 8))
    if not resolved.is_prepared:
        raise SystemExit("Run `anybit inspect` first; it prepares the demo model.")
    gguf = Path(fetch_source("demo").location)
    total = options.context + options.generated
    stream_tokens = -(-max(total, options.stream_prompt + options.generated) // 256) * 256
    peer, about = start_llama_cpp(options.peer_python, gguf, options.threads, options.streams, stream_tokens)
    stack.enter_context(peer)
    address = about.pop("address")
    versions["llama.cpp"] = about
    measures: dict[tuple[str, str], Measure] = {}
    if "single" in options.parts:
        config = EngineConfig(str(resolved.checkpoint), resolved.name, threads=options.threads)
        core, info = assemble(config)
        versions["engine"] = info.device
        measures["single", PEER] = partial(single_llama_cpp, address, peer, options.context)
        for width in map(int, options.widths.split(",")):
            measures["single", str(width)] = partial(single_anybit, core, width, options.context)
    if "streams" in options.parts:
        server, server_address = start_anybit(options.threads)
        stack.enter_context(server)
        no_widths = [None] * options.streams
        measures["streams", PEER] = partial(streams, address, peer, no_widths, options.stream_prompt)
        for case, widths in STREAM_WIDTHS.items():
            spread = [widths[index % len(widths)] for index in range(options.streams)]
            measures["streams", case] = partial(streams, server_address, server, spread, options.stream_prompt)
    return measures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the package xllamacpp")
    parser.add_argument("--threads", type=int, default=2, help="of both; 0 takes the physical cores")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--generated", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", default="2,3,4,6,8")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--stream-prompt", type=int, default=24, help="tokens of each stream's prompt")
    parser.add_argument("--parts", default="single,streams")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="what others may compute during a sample")
    parser.add_argument("--patience", type=float, default=60, help="seconds that a sample waits for quiet")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.threads = options.threads or physical_cores()
    options.parts = options.parts.split(",")
    random.seed(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["anybit"] = anybit_version()
    settings = {"threads": options.threads, "context": options.context, "generated": options.generated}
    settings |= {"parallel_streams": options.streams, "stream_prompt": options.stream_prompt}
    settings["quiet_cores"] = options.quiet_cores

    def save(samples: list[Sample], failures: list[str]) -> None:
        """After every round, so that a run cut short leaves what it had."""
        if options.json:
            report = build_report(versions, settings, samples, failures)
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    with ExitStack() as stack:
        measures = collect_measures(stack, options, versions)
        samples, failures = run_rounds(measures, options, save)
    print_report(build_report(versions, settings, samples, failures))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
