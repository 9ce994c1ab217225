"""The KV format of a server whose user names none: a compressed one where it was measured to win, else an exact one."""

import logging

from anybit.engine.models.decoder import Decoder

logger = logging.getLogger("anybit.engine")

PREFERRED_FORMAT = "qet4"
EXACT_FORMAT = "bf16"

_LEAST_HEAD_DIM = 64  # of models that formats were measured with


def preferred_format(decoder: Decoder) -> str:
    """Before a format is checked; says why if it is the exact one."""
    reason = _why_not(decoder)
    return PREFERRED_FORMAT if reason is None else exact_format(reason)


def exact_format(reason: str) -> str:
    """The exact one, for this reason."""
    logger.info("KV format %s instead of %s: %s", EXACT_FORMAT, PREFERRED_FORMAT, reason)
    return EXACT_FORMAT


def _why_not(decoder: Decoder) -> str | None:
    head_dim = decoder.config.head_dim
    if head_dim < _LEAST_HEAD_DIM or head_dim & (head_dim - 1):
        return (
            f"it is for heads of a power of two channels, {_LEAST_HEAD_DIM} at least, and this model's have {head_dim}."
        )
    if decoder.native is None or not decoder.native.gains_by_pairs():
        return "attention over its pages would be slower on this machine."
    return None
