"""Asks a running server each prompt at every width, alone and then many at once, and compares the texts.

anybit serve &
python tests/bench/same_answer.py --prompts 20 --max-tokens 128 --json same_answer.json
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI
from prompts import PROMPTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--first", type=int, default=0, help="skip this many prompts")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--parallel", type=int, default=15, help="requests in flight together: all widths of 3 prompts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key="none", timeout=600, max_retries=0)
    models = client.models.list().data
    widths = [model.bit_width for model in models if "@" in model.id]  # type: ignore[attr-defined]

    def ask(prompt: str, width: int) -> str:
        answer = client.chat.completions.with_raw_response.create(
            model=models[0].id,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=options.max_tokens,
            temperature=0,
            extra_headers={"X-Bit-Width": str(width)},
        )
        if answer.headers["X-Bit-Width"] != str(width):
            raise SystemExit(f"Asked for {width} bits, served {answer.headers['X-Bit-Width']}.")
        return answer.parse().choices[0].message.content or ""

    started = time.perf_counter()
    jobs = [(prompt, width) for prompt in PROMPTS[options.first :][: options.prompts] for width in widths]
    alone = [ask(*job) for job in jobs]
    with ThreadPoolExecutor(options.parallel) as pool:
        together = list(pool.map(lambda job: ask(*job), jobs))
    equal = sum(one == other for one, other in zip(alone, together, strict=True))
    per_prompt = [alone[start : start + len(widths)] for start in range(0, len(alone), len(widths))]
    different_widths = sum(len(set(texts)) > 1 for texts in per_prompt)
    asked = len(jobs)
    report = {
        "prompts": len(per_prompt),
        "max_tokens": options.max_tokens,
        "parallel": options.parallel,
        "widths": widths,
        "answers": asked,
        "identical_alone_and_together": equal,
        "prompts_where_widths_differ": different_widths,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if equal == asked else 1


if __name__ == "__main__":
    sys.exit(main())
