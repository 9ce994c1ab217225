"""Counts slow paths: a fallback may happen, but never in silence (ARCHITECTURE, style)."""

import logging
from collections import Counter

logger = logging.getLogger("anybit.kernels")

_calls: Counter[str] = Counter()


def record(kernel: str, reason: str) -> None:
    """Count one call of `kernel` that took a slower path; the first of each reason is logged."""
    key = f"{kernel}:{reason}"
    if key not in _calls:
        logger.warning("The kernel %s takes a slower path: %s.", kernel, reason)
    _calls[key] += 1


def snapshot() -> dict[str, int]:
    """Calls since the process started, by "kernel:reason"."""
    return dict(_calls)
