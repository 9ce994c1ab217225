"""The quality table: every method at every width, from saved checkpoints that are read again through the engine.

    python tests/bench/quality.py --calibration FILE --text FILE --json OUT [--rows rtn,best] [--variant rotated]

Each row quantizes SmolLM2-135M-Instruct in groups of 64 into the folder --work (unless it is there), loads what it wrote
and scores the first 16,384 tokens of the text in windows of 1,024. Calibrated rows all see the same windows, as many of
FILE as of the text that ships with AnyBit. Rows of a run replace those of the same method, variant and seed in OUT; where
every width has a checkpoint of its own, --widths makes some of them and leaves the others in OUT alone. "rotated" is the
same function with other weights (`quality_sources`), off the 4-bit grid of the file that the demo model comes in.
--markdown prints the table of OUT and does nothing else.
"""

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from quality_sources import RotatedSource
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.batch import BatchPlan
from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.machine import describe_device, keep_freed_memory, physical_cores, resolve_device
from anybit.engine.models.decoder import Decoder
from anybit.engine.quantize.options import SHIPPED, QuantizeOptions
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.quantize.run import quantize
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.selfcheck import check_checkpoint
from anybit.engine.weights.source import SourceModel
from anybit.kernels.cpu.bindings import set_threads
from anybit.kvcache.pool import KVPool

WIDTHS = (2, 3, 4, 6, 8)
CONTEXT = 1024
MAX_TOKENS = 16384


@dataclass(frozen=True)
class Row:
    """A line of the table: one checkpoint for all widths, or (`single`) one for each."""

    name: str
    options: dict[str, Any]
    single: bool = False
    widths: tuple[int, ...] = WIDTHS
    texts: str = "both"
    seeds: tuple[int, ...] = field(default=(0,))


_TEXTS = {"both": lambda file: (file, SHIPPED), "file": lambda file: (file,), "shipped": lambda file: (SHIPPED,)}
ROWS = {
    "rtn": Row("round to nearest, nested", {"method": "rtn"}),
    "gptq": Row("GPTQ per width", {"method": "gptq"}, single=True),
    "gptq-damped": Row("GPTQ per width, damping 10 %", {"method": "gptq", "damping": 0.1}, single=True),
    "decoupleq-1": Row("decoupleQ per width, stage 1", {"method": "decoupleq", "stages": 1}, single=True),
    "decoupleq-2": Row("decoupleQ per width, stages 1 and 2", {"method": "decoupleq"}, single=True),
    "decoupleq-1-damped": Row(
        "decoupleQ per width, stage 1, damping 10 %",
        {"method": "decoupleq", "stages": 1, "damping": 0.1},
        single=True,
    ),
    "decoupleq-2-damped": Row(
        "decoupleQ per width, stages 1 and 2, damping 10 %", {"method": "decoupleq", "damping": 0.1}, single=True
    ),
    "decoupleq-projected": Row(
        "decoupleQ per width, stage 1, projected gradients, damping 10 %",
        {"method": "decoupleq-projected", "stages": 1, "damping": 0.1},
        single=True,
    ),
    "decoupleq-channel": Row(
        "decoupleQ 2 bits per channel", {"method": "decoupleq", "per_channel": True}, single=True, widths=(2,)
    ),
    "decoupleq-nest": Row("decoupleQ, nested", {"method": "decoupleq"}),
    "gptq-sliced": Row("GPTQ at 8 bits, sliced", {"method": "gptq-sliced"}),
    "gptq-nest": Row("GPTQ for all widths together, nested", {"method": "gptq"}),
    "best-1": Row("AnyBit best, no training, nested", {"method": "best", "stages": 1}),
    "best": Row("AnyBit best, nested", {"method": "best"}, seeds=(0, 1, 2)),
    "best-shipped": Row("AnyBit best, nested, shipped text alone", {"method": "best"}, texts="shipped"),
    "best-file": Row("AnyBit best, nested, calibration file alone", {"method": "best"}, texts="file"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--variant", choices=("original", "rotated", "both"), default="both")
    parser.add_argument("--widths", type=lambda text: tuple(map(int, text.split(","))), default=WIDTHS)
    parser.add_argument("--sequences", type=int, default=96, help="windows that calibrated rows see")
    parser.add_argument("--context", type=int, default=256, help="tokens of such a window")
    parser.add_argument("--seeds", type=int, default=3, help="of rows that have several")
    parser.add_argument("--source", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints in the folder")
    parser.add_argument("--reuse", action="store_true", help="score checkpoints found there, whatever made them")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.json.read_text())))
        return
    if arguments.text is None or arguments.calibration is None:
        parser.error("--text and --calibration are needed.")
    keep_freed_memory()
    variants = ("original", "rotated") if arguments.variant == "both" else (arguments.variant,)
    for variant in variants:
        source = fetch_source(arguments.source)
        run_rows(source if variant == "original" else RotatedSource(source), variant, arguments)


class Remembered:
    """A decoder that computes the hidden states of known windows once: the float model is scored with every row."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: tuple[int, ...] = ()
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def forward(self, plan: BatchPlan, pool: KVPool) -> Tensor:
        """Of one sequence's next tokens, [tokens, hidden]."""
        tokens = tuple(plan.token_ids.tolist())
        self._window = tokens if int(plan.positions[0]) == 0 else self._window + tokens
        if self._window not in self._hidden:
            self._hidden[self._window] = self._decoder.forward(plan, pool)
        return self._hidden[self._window]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def run_rows(source: SourceModel, variant: str, arguments: argparse.Namespace) -> None:
    float_decoder: Remembered | None = None
    for name in arguments.rows.split(","):
        row = ROWS[name]
        for seed in row.seeds[: arguments.seeds]:
            checkpoints = [
                make_checkpoint(source, variant, name, widths, seed, arguments)
                for widths in (
                    [(width,) for width in row.widths if width in arguments.widths] if row.single else [row.widths]
                )
            ]
            if float_decoder is None:
                reader = CheckpointReader(checkpoints[0][0])
                float_decoder = Remembered(comparison_of(reader, arguments).unquantized(source).decoder)
            results = score(float_decoder, checkpoints, arguments)
            entry = {"method": row.name, "variant": variant, "seed": seed, **results}
            store(arguments.json, entry, row.single, arguments)
            if not arguments.keep:
                for directory, _ in checkpoints:
                    shutil.rmtree(directory)


def make_checkpoint(
    source: SourceModel, variant: str, name: str, widths: tuple[int, ...], seed: int, arguments: argparse.Namespace
) -> tuple[Path, float]:
    """The directory and the minutes that making it took."""
    row = ROWS[name]
    directory = arguments.work / f"{name}-{variant}-{'_'.join(map(str, widths))}-{seed}"
    minutes_file = arguments.work / f"{directory.name}.minutes"
    if arguments.reuse and minutes_file.is_file() and directory.is_dir():
        return directory, float(minutes_file.read_text())
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    options = QuantizeOptions(
        **row.options,
        bit_widths=widths,
        group_size=64,
        calibration=_TEXTS[row.texts](str(arguments.calibration)),
        sequences=arguments.sequences,
        context=arguments.context,
        seed=seed,
        device=arguments.device,
    )
    started = time.perf_counter()
    quantize(source, directory, options)
    minutes = (time.perf_counter() - started) / 60
    check_checkpoint(directory, resolve_device(arguments.device))
    minutes_file.write_text(str(minutes))
    return directory, minutes


def comparison_of(reader: CheckpointReader, arguments: argparse.Namespace) -> Comparison:
    return Comparison(reader, CONTEXT, 8, ("bf16",), resolve_device(arguments.device))


def score(
    float_decoder: Remembered, checkpoints: Sequence[tuple[Path, float]], arguments: argparse.Namespace
) -> dict[str, Any]:
    set_threads(physical_cores())
    torch.set_num_threads(physical_cores())
    variants: list[Variant] = []
    made_in: list[float] = []
    for directory, minutes in checkpoints:
        reader = CheckpointReader(directory)
        nested = comparison_of(reader, arguments).nested(reader.manifest.bit_widths)
        if reader.manifest.method_options.get("per_channel"):
            for variant in nested:
                variant.effective_bits = variant.bit_width + _channel_bits(reader)
        variants += nested
        made_in += [minutes] * len(nested)
    tokenizer = Tokenizer.from_file(str(checkpoints[0][0] / "tokenizer.json"))
    token_ids = tokenizer.encode(read_text(arguments.text), add_special_tokens=False).ids
    reference = Variant("float", cast(Decoder, float_decoder), 8, "bf16", 32.0, "float")
    score_windows([reference, *variants], windows(token_ids, CONTEXT, MAX_TOKENS), reference)
    return {
        "float_perplexity": reference.perplexity,
        "widths": {
            str(variant.bit_width): {
                "effective_bits": round(variant.effective_bits, 3),
                "perplexity": variant.perplexity,
                "kl": variant.kl / variant.tokens,
                "top1_agreement": variant.agreements / variant.tokens,
                "minutes": round(minutes, 2),
            }
            for variant, minutes in zip(variants, made_in, strict=True)
        },
    }


def _channel_bits(reader: CheckpointReader) -> float:
    """Bits a weight of a scale and a zero per row."""
    shapes = [entry.shape for name, entry in reader.manifest.tensors.items() if ".layers." in name]
    return 32 * sum(rows for rows, _ in shapes) / sum(rows * columns for rows, columns in shapes)


def store(path: Path, row: dict[str, Any], is_single: bool, arguments: argparse.Namespace) -> None:
    """Add the row to the file, in place of its former self; of single widths, those not made again are kept."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    row["device"] = f"{platform.machine()}, {describe_device(resolve_device(arguments.device))}"
    row["calibration"] = f"{arguments.sequences} x {arguments.context} tokens"
    row["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    key = (row["method"], row["variant"], row["seed"])
    if is_single:
        former = [other for other in report["rows"] if (other["method"], other["variant"], other["seed"]) == key]
        row["widths"] = {**(former[0]["widths"] if former else {}), **row["widths"]}
    kept = [other for other in report["rows"] if (other["method"], other["variant"], other["seed"]) != key]
    report |= {"model": "SmolLM2-135M-Instruct", "text": arguments.text.name, "group_size": 64, "rows": [*kept, row]}
    path.write_text(json.dumps(report, indent=1))
    print(markdown({"rows": [row]}).splitlines()[-1], flush=True)


def markdown(report: dict[str, Any]) -> str:
    """A line per method and variant; rows of several seeds give their mean and, at the narrowest width, all of them."""
    lines = ["| weights | method | 2 | 3 | 4 | 6 | 8 | minutes |", "|---|---|---|---|---|---|---|---|"]
    of_method: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        of_method.setdefault((row["variant"], row["method"]), []).append(row)
    for (variant, method), rows in sorted(of_method.items(), key=lambda entry: entry[0][0]):
        cells = [_cell([row["widths"][str(width)] for row in rows if str(width) in row["widths"]]) for width in WIDTHS]
        minutes = sorted({entry["minutes"] for row in rows for entry in row["widths"].values()})
        spent = f"{minutes[0]:.1f}" + (f" to {minutes[-1]:.1f}" if minutes[-1] > minutes[0] + 0.05 else "")
        lines.append(f"| {variant} | {method} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def _cell(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    perplexities = [entry["perplexity"] for entry in entries]
    kl = statistics.mean(entry["kl"] for entry in entries)
    spread = f" [{', '.join(f'{value:.1f}' for value in perplexities)}]" if len(entries) > 1 else ""
    return f"{statistics.mean(perplexities):,.2f} ({kl:.3f}){spread}"


if __name__ == "__main__":
    main()
