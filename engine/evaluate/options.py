"""What an evaluation is asked for. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from anybit.engine.evaluate.questions import Question

MATQUANT_SLICE = "matquant-slice"
BASELINES = (MATQUANT_SLICE,)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """`text` None is the text that ships with the package, which `perplexity` False leaves unread; `bit_widths` empty
    means all of the checkpoint; `threads` 0 the physical cores."""

    text: Path | None = None
    perplexity: bool = True
    questions: tuple[Question, ...] = ()
    context: int = 1024
    max_tokens: int | None = None
    bit_widths: tuple[int, ...] = ()
    lm_head_bits: int = 8
    kv_formats: tuple[str, ...] = ("bf16",)
    baselines: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 0
