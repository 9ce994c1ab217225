"""For `llama_cpp_peer.py`: medians, ratios and what they should be, from the samples."""

import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEER = "llama.cpp"

# Of the flags in /proc/cpuinfo those that decide which kernels run.
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ratio:
    """`field` of the case `over`, divided by that of the case `under`, in `part`."""

    part: str
    field: str
    over: str
    under: str
    wanted: float
    at_most: bool = False

    def judge(self, samples: list[Sample]) -> dict[str, Any]:
        ratios = paired_ratios(samples, self.part, self.field, self.over, self.under)
        value = _median(ratios)
        reached = None if value is None else value <= self.wanted if self.at_most else value >= self.wanted
        wanted = f"{'<=' if self.at_most else '>='} {self.wanted}"
        return {"value": value, "wanted": wanted, "reached": reached, "rounds": len(ratios)}


def wanted_ratios(cpu_flags: list[str]) -> dict[str, Ratio]:
    decode, prompt, speed = "decode_tokens_per_second", "prompt_tokens_per_second", "tokens_per_second"
    prompt_wanted = 3.5 if BF16_FLAGS & set(cpu_flags) else 1.5
    return {
        "decode speed, 4 bits to llama.cpp": Ratio("single", decode, "4", PEER, 1.25),
        "decode speed, 3 bits to 4 bits": Ratio("single", decode, "3", "4", 1.0),
        "decode speed, 2 bits to 4 bits": Ratio("single", decode, "2", "4", 1.3),
        "decode speed, 8 bits to llama.cpp": Ratio("single", decode, "8", PEER, 0.8),
        "prompt speed, 4 bits to llama.cpp": Ratio("single", prompt, "4", PEER, prompt_wanted),
        "speed of all streams, 4 bits to llama.cpp": Ratio("streams", speed, "4", PEER, 1.5),
        "time to first token of the streams, 4 bits to llama.cpp": Ratio(
            "streams", "first_token_seconds", "4", PEER, 1.0, at_most=True
        ),
        "time of all streams, 2+4+8 bits to 8 bits": Ratio("streams", "seconds", "2+4+8", "8", 1.3, at_most=True),
    }


def paired_ratios(samples: list[Sample], part: str, field: str, over: str, under: str) -> list[float]:
    """One per round that has both."""
    above, below = _by_round(samples, part, field, over), _by_round(samples, part, field, under)
    return [above[index] / below[index] for index in above if index in below]


def build_report(
    versions: dict[str, Any], settings: dict[str, Any], samples: list[Sample], failures: list[str]
) -> dict[str, Any]:
    """Disturbed samples are listed and nothing else: what they say depends on who disturbed."""
    quiet = [sample for sample in samples if not sample["disturbed"]]
    present = _cpuinfo("flags").split()
    cpu_flags = [flag for flag in CPU_FLAGS if flag in present]
    return {
        "machine": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_flags": cpu_flags,
        "versions": versions,
        **settings,
        "rounds": max((sample["round"] for sample in samples), default=0),
        "decode": _rows(quiet, "single", "decode_tokens_per_second", []),
        "prompt": _rows(quiet, "single", "prompt_tokens_per_second", []),
        "streams": _rows(quiet, "streams", "tokens_per_second", ["seconds", "first_token_seconds"]),
        "ratios": {name: ratio.judge(quiet) for name, ratio in wanted_ratios(cpu_flags).items()},
        "disturbed_samples": len(samples) - len(quiet),
        "failures": failures,
        "samples": samples,
    }


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{report['machine']}, {report['threads']} threads, {' '.join(report['cpu_flags'])}")
    for name in ("decode", "prompt", "streams"):
        first = f"{'first token s':>15}" if name == "streams" else ""
        print(f"\n{name:<10}{'tokens/s':>10}{'to llama.cpp':>14}{first}")
        for row in report[name]:
            first = f"{row['first_token_seconds']:15.3f}" if "first_token_seconds" in row else ""
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            print(f"{row['case']:<10}{row['tokens_per_second']:10.1f}{ratio:>14}{first}")
    print("\nratios: the median over the rounds of one against the other in the same round")
    for name, ratio in report["ratios"].items():
        value = "-" if ratio["value"] is None else f"{ratio['value']:.2f}"
        verdict = {True: "reached", False: "MISSED", None: "not measured"}[ratio["reached"]]
        print(f"{name:<58}{value:>6} {ratio['wanted']:>8}  {verdict} ({ratio['rounds']} rounds)")
    if report["disturbed_samples"]:
        print(f"\n{report['disturbed_samples']} of {len(report['samples'])} samples were disturbed and left out.")
    for failure in report["failures"]:
        print(f"\nFailed: {failure}")


def _rows(samples: list[Sample], part: str, speed: str, fields: list[str]) -> list[dict[str, Any]]:
    """One row per case, the peer's first: the median of `speed`, its ratio to the peer's, medians of `fields`."""
    cases = dict.fromkeys(sample["case"] for sample in samples if sample["part"] == part)
    return [
        {
            "case": case,
            "tokens_per_second": _median(_by_round(samples, part, speed, case).values()),
            "ratio": _median(paired_ratios(samples, part, speed, case, PEER)),
        }
        | {field: _median(_by_round(samples, part, field, case).values()) for field in fields}
        for case in cases
    ]


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def _by_round(samples: list[Sample], part: str, field: str, case: str) -> dict[int, float]:
    return {sample["round"]: sample[field] for sample in samples if (sample["part"], sample["case"]) == (part, case)}


def _cpuinfo(key: str) -> str:
    """The value of the first processor; empty where the file has another form."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
