"""A checkpoint with keys and values in bf16 on a text, which scripts measure other formats against."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kv_inputs import describe_machine
from tokenizers import Tokenizer

from anybit.engine.evaluate.comparison import Comparison
from anybit.engine.evaluate.perplexity import score_windows
from anybit.engine.evaluate.text import read_text, windows
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.machine import keep_freed_memory, physical_cores, resolve_device, use_threads
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.resolve import resolve_model

WIDTHS = (2, 3, 4, 6, 8)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="an AnyBit checkpoint; without it the demo model's")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--bit-width", type=int, default=8)


@dataclass(frozen=True, slots=True)
class Reference:
    """What `add_options` has asked for, on the CPU."""

    options: argparse.Namespace
    reader: CheckpointReader
    variant: Variant
    device: torch.device

    @classmethod
    def open(cls, options: argparse.Namespace) -> "Reference":
        device = resolve_device("cpu")
        use_threads(physical_cores(), device)
        keep_freed_memory()
        reader = CheckpointReader(resolve_model(options.model, "best", None, WIDTHS).checkpoint)
        (variant,) = Comparison(reader, options.context, 8, (OWN_FORMAT,), device).nested((options.bit_width,))
        return cls(options, reader, variant, device)

    def encode(self, text: str) -> list[int]:
        tokenizer = Tokenizer.from_file(str(self.reader.directory / "tokenizer.json"))
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def windows(self) -> list[list[int]]:
        """Of the text."""
        return windows(self.encode(read_text(self.options.text)), self.options.context, self.options.max_tokens)

    def score(self, variants: Sequence[Variant], token_windows: Sequence[Sequence[int]] | None = None) -> None:
        """Beside the reference, on all of the text's windows or on these."""
        score_windows(
            [self.variant, *variants],
            self.windows() if token_windows is None else token_windows,
            self.variant,
            lambda done, total: print(f"{done} of {total}", flush=True),
        )

    def about(self) -> dict[str, Any]:
        """For a report, once something has been scored."""
        return {
            "model": self.reader.manifest.source_name,
            "text": self.options.text.name,
            "tokens": self.variant.tokens,
            "context": self.options.context,
            "bit_width": self.options.bit_width,
            "machine": describe_machine(self.device),
        }
