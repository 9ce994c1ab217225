"""What attention over pages is given besides queries, whichever kernel computes it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """Scores are q·k·scale, under a softcap softcap·tanh(score/softcap); with a window the newest that many tokens are seen."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ExactPages:
    """Pages as they were written, [pages, kv_heads, 64, head_dim]."""

    keys: Tensor
    values: Tensor
