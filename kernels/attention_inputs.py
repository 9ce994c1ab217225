"""What attention over pages is given besides queries, whichever kernel computes it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """Scores are q·k·scale, with a softcap softcap·tanh(score/softcap); with a window only the newest tokens are seen."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ExactPages:
    """Pages as they were written, [pages, kv_heads, 64, head_dim]."""

    keys: Tensor
    values: Tensor
