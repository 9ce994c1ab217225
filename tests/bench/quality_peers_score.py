"""Scores what other quantizers made of a model, as floats, with AnyBit's own evaluation; the rows of the quality table.

    python tests/bench/quality_peers_score.py --text FILE --json quality_peers_cpu.json
    python tests/bench/quality_peers_score.py DIRECTORY --text FILE --method gptq --bit-width 4 --effective-bits 4.25

Without DIRECTORY the float model is scored, with it the weights there (safetensors under Hugging Face names). Windows do
not overlap and begin with no special token. KL is from the original float model, in nats per token: the rotated one computes
the same function. Rows are added to those in the file; one of the same method, variant and width is replaced.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from quality_sources import ReplacedSource, RotatedSource
from tokenizers import Tokenizer

from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.machine import describe_device, keep_freed_memory, physical_cores
from anybit.engine.models.decoder import build_decoder
from anybit.engine.models.registry import parse_config
from anybit.engine.quantize.prepare import fetch_source
from anybit.engine.weights.loader import DenseLoader
from anybit.engine.weights.open_source import open_source
from anybit.engine.weights.source import SourceModel
from anybit.kernels.cpu.bindings import set_threads

VARIANTS = ("original", "rotated")
_TOGETHER = 6  # candidates whose weights are in memory at once, beside the float model they share
_KV_FORMAT = "bf16"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to score and what its row says about it; `bit_width` is the name of its format where it mixes widths."""

    method: str
    variant: str
    bit_width: int | str
    effective_bits: float
    minutes: float
    source: SourceModel
    more: Mapping[str, Any] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every script of these takes."""
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to report on")
    parser.add_argument("--variant", choices=VARIANTS, default="original")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file whose rows are added to")


def prepare(options: argparse.Namespace) -> None:
    keep_freed_memory()
    options.threads = options.threads or physical_cores()
    set_threads(options.threads)
    torch.set_num_threads(options.threads)


def open_variant(options: argparse.Namespace) -> SourceModel:
    """The float model with its tensors in memory: decoding and rotating them for each row would cost more than a format."""
    original = fetch_source("demo")
    source = RotatedSource(original, options.seed) if options.variant == "rotated" else original
    return ReplacedSource(source, {name: source.tensor(name) for name in source.tensor_names()})


def encode(source: SourceModel, path: Path, share: float = 1.0) -> list[int]:
    """Tokens of the first `share` of a text's characters."""
    with tempfile.TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    text = read_text(path)
    token_ids: list[int] = tokenizer.encode(text[: int(len(text) * share)], add_special_tokens=False).ids
    return token_ids


def score(candidates: Iterable[Candidate], options: argparse.Namespace, versions: Mapping[str, Any]) -> list[Row]:
    """The row of each, printed and saved as soon as it is there; candidates are taken from the iterable as needed."""
    original = fetch_source("demo")
    token_windows = windows(encode(original, options.text), options.context, options.max_tokens)
    reference = _variant(original, "float", options.context)
    rows: list[Row] = []
    remaining = iter(candidates)
    while group := list(islice(remaining, _TOGETHER)):
        scored = [_variant(candidate.source, candidate.method, options.context) for candidate in group]
        score_windows(scored, token_windows, reference)
        made = [_row(candidate, variant) for candidate, variant in zip(group, scored, strict=True)]
        for row in made:
            print(json.dumps(row), flush=True)
        if options.json:
            _save(made, scored[0].tokens, options, versions)
        rows += made
    return rows


def _variant(source: SourceModel, label: str, context: int) -> Variant:
    decoder = build_decoder(parse_config(source.config), DenseLoader(source), context)
    return Variant(label, decoder, 8, _KV_FORMAT, 0.0)


def _row(candidate: Candidate, variant: Variant) -> Row:
    return {
        "method": candidate.method,
        "variant": candidate.variant,
        "bit_width": candidate.bit_width,
        "effective_bits": round(candidate.effective_bits, 4),
        "perplexity": variant.perplexity,
        "kl": variant.kl / variant.tokens,
        "top1_agreement": variant.agreements / variant.tokens,
        "minutes": round(candidate.minutes, 3),
        **candidate.more,
    }


def _save(rows: Sequence[Row], tokens: int, options: argparse.Namespace, versions: Mapping[str, Any]) -> None:
    path: Path = options.json
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {"text": options.text.name, "tokens": tokens, "context": options.context, "kv_format": _KV_FORMAT}
    if any(report.get(name, value) != value for name, value in settings.items()):
        raise SystemExit(f"{path} holds rows of other settings; give another file.")
    here = {"python": platform.python_version(), "torch": torch.__version__, **versions}
    device = f"{platform.machine()}, {describe_device(torch.device('cpu'))}"
    kept = {_key(row): row for row in [*report.get("rows", []), *rows]}
    report |= {"model": fetch_source("demo").name, "device": device, **settings}
    report["versions"] = report.get("versions", {}) | here
    report["rows"] = sorted(kept.values(), key=lambda row: (row["variant"], row["method"], row["effective_bits"]))
    path.write_text(json.dumps(report, indent=1) + "\n")


def _key(row: Row) -> tuple[str, str, str]:
    return row["method"], row["variant"], str(row["bit_width"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    add_options(parser)
    parser.add_argument("--method", default="float")
    parser.add_argument("--bit-width", default="float")
    parser.add_argument("--effective-bits", type=float, default=32.0)
    parser.add_argument("--minutes", type=float, default=0.0, help="that the quantizer took")
    options = parser.parse_args()
    prepare(options)
    candidate = Candidate(
        method=options.method,
        variant=options.variant,
        bit_width=int(options.bit_width) if options.bit_width.isdecimal() else options.bit_width,
        effective_bits=options.effective_bits,
        minutes=options.minutes,
        source=open_variant(options) if options.directory is None else open_source(options.directory),
    )
    score([candidate], options, {})


if __name__ == "__main__":
    main()
