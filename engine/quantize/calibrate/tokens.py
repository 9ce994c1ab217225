"""Calibration text as token windows."""

import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anybit.engine.errors import SourceError
from anybit.engine.quantize.options import SHIPPED

_SHIPPED_FILE = "calibration.txt"
"""What SmolLM2-135M-Instruct says about many things, sampled by tests/bench/calibration_text.py; nobody's property."""
_BYTES_PER_TOKEN = 12  # more than text in any language takes


def read_calibration(name: str) -> str:
    """The text of a UTF-8 file, or the one that ships with the package."""
    if name == SHIPPED:
        return (importlib.resources.files("anybit.engine.quantize") / _SHIPPED_FILE).read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The calibration text {name} cannot be read as UTF-8.") from error


def sample_texts(
    texts: Sequence[str], encode: Callable[[str], list[int]], first: list[int], count: int, context: int, seed: int
) -> Tensor:
    """`count` windows, as many from each of the texts, shuffled: int64 [count, context]."""
    shares = [count * (index + 1) // len(texts) - count * index // len(texts) for index in range(len(texts))]
    windows = [
        sample_windows(text, encode, first, share, context, seed) for text, share in zip(texts, shares, strict=True)
    ]
    return torch.cat(windows)[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def sample_windows(
    text: str, encode: Callable[[str], list[int]], first: list[int], count: int, context: int, seed: int
) -> Tensor:
    """`count` windows of `context` tokens from random places of `text`, each begun with `first`: int64 [count, context].

    Only the windows are tokenized, so that a long text costs nothing. SourceError if the text is too short.
    """
    wanted = context - len(first)
    span = _BYTES_PER_TOKEN * (wanted + 8)
    generator = torch.Generator().manual_seed(seed)
    if len(text) <= 2 * span:
        token_ids = encode(text)
        if len(token_ids) < wanted:
            raise SourceError(f"The calibration text has {len(token_ids)} tokens, fewer than one window of {context}.")
        starts = torch.randint(0, len(token_ids) - wanted + 1, (count,), generator=generator).tolist()
        return torch.tensor([[*first, *token_ids[start : start + wanted]] for start in starts])
    windows = []
    # One window from each of `count` equal parts of the text: nothing is drawn twice as long as the text is long enough.
    part = (len(text) - span) / count
    for index in range(count):
        offset = float(torch.rand((), generator=generator))
        start = int((index + offset) * part)
        # The first token may begin within a word; a few are dropped.
        token_ids = encode(text[start : start + span])[4:]
        if len(token_ids) < wanted:
            raise SourceError(f"The calibration text is too repetitive: {span} characters are {len(token_ids)} tokens.")
        windows.append([*first, *token_ids[:wanted]])
    return torch.tensor(windows)
