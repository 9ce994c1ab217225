"""Time to the first token of prompts that begin with 1,000 tokens seen before, against prompts that begin with new ones.

anybit serve &
python tests/bench/prefix_cache.py --json prefix_cache.json
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import httpx

OWN_TOKENS = 20  # of every prompt, behind what it shares with others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--shared-tokens", type=int, default=1000)
    parser.add_argument("--widths", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng = random.Random(time.time_ns())  # a second run must not find the prompts of the first

    def tokens(count: int) -> list[int]:
        return rng.choices(range(1000, 40000), k=count)

    with httpx.Client(base_url=options.base_url, timeout=600) as client:
        rows = []
        for width in map(int, options.widths.split(",")):
            new, seen, cached = [], [], []
            for _ in range(options.rounds):
                shared = tokens(options.shared_tokens)
                new.append(first_token_seconds(client, shared + tokens(OWN_TOKENS), width)[0])
                seconds, num_cached = first_token_seconds(client, shared + tokens(OWN_TOKENS), width)
                seen.append(seconds)
                cached.append(num_cached)
            rows.append(
                {
                    "bit_width": width,
                    "new_ttft_seconds": statistics.median(new),
                    "seen_ttft_seconds": statistics.median(seen),
                    "ratio": statistics.median(one / other for one, other in zip(new, seen, strict=True)),
                    "cached_tokens": min(cached),
                }
            )
            print(json.dumps(rows[-1]))
        # A page made at one width is no use at another.
        shared = tokens(options.shared_tokens)
        first_token_seconds(client, shared + tokens(OWN_TOKENS), 2)
        other_width = first_token_seconds(client, shared + tokens(OWN_TOKENS), 8)[1]
        print(f"cached tokens at 8 bits of a prompt seen at 2: {other_width}")
    report = {"shared_tokens": options.shared_tokens, "rows": rows, "cached_across_widths": other_width}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def first_token_seconds(client: httpx.Client, prompt: list[int], width: int) -> tuple[float, int]:
    """Seconds to the first chunk of a stream, and how many of the prompt's tokens were cached."""
    body = {"prompt": prompt, "max_tokens": 1, "bit_width": width, "stream": True, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    started = time.perf_counter()
    seconds = None
    usage = {}
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            seconds = seconds or time.perf_counter() - started
            usage = json.loads(line.removeprefix("data: "))["usage"] or usage
    if seconds is None:
        raise SystemExit("The server sent no token.")
    return seconds, usage["prompt_tokens_details"]["cached_tokens"]


if __name__ == "__main__":
    main()
