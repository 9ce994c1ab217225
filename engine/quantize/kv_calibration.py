"""Balance weights of a checkpoint's keys, estimated from texts of the user's instead of the one at every start."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from anybit.engine.kv.key_balance import KeyBalance, save_key_balance
from anybit.engine.kv.prompt_heads import read_heads
from anybit.engine.models.decoder import build_decoder
from anybit.engine.models.registry import read_config
from anybit.engine.quantize.calibrate.tokens import read_calibration, sample_texts
from anybit.engine.text_prefix import first_tokens
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.engine.weights.manifest import KeyBalanceEntry

_WINDOWS = 16
_CONTEXT = 512


def key_windows(directory: Path, names: Sequence[str], seed: int) -> list[list[int]]:
    """Windows of token ids of the texts `names` (files, or "shipped"), by the tokenizer in a checkpoint's directory.

    SourceError if a text cannot be read or is too short.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    texts = [read_calibration(name) for name in names]
    sampled = sample_texts(texts, encode, first_tokens(tokenizer), max(_WINDOWS, len(texts)), _CONTEXT, seed)
    windows: list[list[int]] = sampled.tolist()
    return windows


def calibrate_keys(
    directory: Path,
    names: Sequence[str],
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> KeyBalanceEntry:
    """Write the weights from windows of the texts (`key_windows`) beside a checkpoint's others, read at its widest width."""
    config = read_config(directory)
    windows = [window[: config.max_position_embeddings] for window in key_windows(directory, names, seed)]
    reader = CheckpointReader(directory)
    width = max(reader.manifest.bit_widths)
    decoder = build_decoder(config, NestedLoader(reader, (width,), 8, device), _CONTEXT, device=device)
    balance = KeyBalance()
    for done, window in enumerate(windows):
        progress(done, len(windows))
        balance.add(read_heads(decoder, window, width))
    save_key_balance(directory, balance.weights())
    progress(len(windows), len(windows))
    texts = {Path(name).name: hashlib.sha256(read_calibration(name).encode()).hexdigest() for name in names}
    return KeyBalanceEntry(texts, sum(map(len, windows)))
