"""The text that perplexity is measured on. Loads no torch."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from anybit.engine.errors import SourceError

BUILTIN_TEXT = "alice_in_wonderland.txt"
"""Chapters I to III of Lewis Carroll's Alice's Adventures in Wonderland (1865), which is in the public domain."""


def builtin_text() -> str:
    return (importlib.resources.files("anybit.engine.evaluate") / BUILTIN_TEXT).read_text()


def read_text(path: Path) -> str:
    """The whole file; SourceError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The text {path} cannot be read as UTF-8.") from error


def windows(
    token_ids: Sequence[int], context: int, max_tokens: int | None, first: Sequence[int] = ()
) -> list[list[int]]:
    """Whole windows of `context` tokens without overlap, from at most `max_tokens` tokens; SourceError if none fits.

    Each begins with `first`, the tokens that the model expects before every text.
    """
    limit = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
    step = context - len(first)
    if not 1 <= step <= limit:
        raise SourceError(f"The text has {limit} tokens, fewer than one window of {context}; use a shorter --context.")
    return [[*first, *token_ids[start : start + step]] for start in range(0, limit - step + 1, step)]
