"""Decode speed of Transformers with bf16 weights beside AnyBit's, in alternating rounds on the same machine.

    python tests/bench/transformers_peer.py --threads 2 --json transformers_peer.json

Both decode greedily from the same number of cached tokens; AnyBit without HTTP, as in `anybit bench decode`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from anybit.engine.bench.decode import bench_decode
from anybit.engine.bench.subject import loaded_subject
from anybit.engine.config import EngineConfig
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.weights.resolve import resolve_model


def transformers_tokens_per_second(model: object, batch: int, context: int, steps: int) -> float:
    """Tokens per second of greedy decoding with the library's own cache."""
    ids = torch.randint(1000, 20000, (batch, context))
    with torch.inference_mode():
        out = model(ids, use_cache=True)  # type: ignore[operator]
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        started = 0.0
        for step in range(steps + 2):
            if step == 2:
                started = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)  # type: ignore[operator]
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return batch * steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", default="2,3,4,6,8")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    widths = tuple(int(width) for width in options.widths.split(","))
    resolved = resolve_model(None, "rtn", options.group_size, (2, 3, 4, 6, 8))
    if not resolved.is_prepared:
        raise SystemExit("Run `anybit inspect` first; it prepares the demo model.")
    gguf = Path(fetch_source("demo").location)
    if options.threads:
        torch.set_num_threads(options.threads)
    peer = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    batches = (1, 8)
    config = EngineConfig(str(resolved.checkpoint), resolved.name, threads=options.threads)
    peers: dict[int, list[float]] = {batch: [] for batch in batches}
    ours: dict[tuple[int, int], list[float]] = {(width, batch): [] for width in widths for batch in batches}
    for _ in range(options.rounds):
        for batch in batches:
            peers[batch].append(transformers_tokens_per_second(peer, batch, options.context, options.steps))
        report = bench_decode([(loaded_subject(config), widths)], batches, options.context, options.steps, rounds=1)
        for row in report["rows"]:
            ours[row["bit_width"], row["batch"]].append(row["tokens_per_second"])
    rows = [
        {
            "bit_width": width,
            "batch": batch,
            "anybit_tokens_per_second": statistics.median(speeds),
            "transformers_bf16_tokens_per_second": statistics.median(peers[batch]),
            "ratio": statistics.median(speeds) / statistics.median(peers[batch]),
        }
        for (width, batch), speeds in ours.items()
    ]
    result = {"device": report["device"], "versions": report["versions"], "context": options.context, "rows": rows}
    for row in rows:
        print(json.dumps(row))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
