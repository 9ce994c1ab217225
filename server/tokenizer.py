"""Text to token ids, with the tokenizer of the checkpoint."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from anybit.engine.errors import CheckpointError
from anybit.server.detokenizer import IncrementalDecoder
from anybit.server.errors import ContextLengthError
from anybit.server.token_text import TokenTexts

# Shorter texts are encoded and decoded faster than a thread is reached.
_INLINE_CHARACTERS = 2048
_INLINE_TOKENS = 1024


class PromptTokenizer:
    """The tokenizer of one checkpoint; `encode` never blocks the event loop for long."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: dict[str, str], eos_token_ids: frozenset[int]) -> None:
        self._backend = tokenizer
        self.special_tokens = special_tokens  # "bos_token", "eos_token", … -> text, for the chat template
        self.eos_token_ids = eos_token_ids
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.texts = TokenTexts(tokenizer)
        self._longest_token = _longest_token(tokenizer)

    def decoder(self, prompt_token_ids: list[int]) -> IncrementalDecoder:
        """What turns the tokens that follow this prompt into text."""
        return IncrementalDecoder(self._backend, self.special_token_ids, prompt_token_ids)

    async def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int, param: str) -> list[int]:
        """Token ids of `text`.

        Raises ContextLengthError, naming the field `param`, without tokenizing when `text` has more characters than
        `max_tokens` tokens can hold.
        """
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        if self._longest_token is not None:
            normalizer = self._backend.normalizer
            length = len(text) if normalizer is None else len(await asyncio.to_thread(normalizer.normalize_str, text))
            if length > max_tokens * self._longest_token:
                at_least = -(-length // self._longest_token)
                raise ContextLengthError(
                    f"The prompt has at least {at_least} tokens, but the context holds {max_tokens}; shorten it.",
                    param=param,
                )
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of these tokens, special ones written out; ids that stand for nothing are left out."""
        if len(token_ids) <= _INLINE_TOKENS:
            return self._decode(token_ids)
        return await asyncio.to_thread(self._decode, token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch form is the one that lets go of the interpreter lock while it works.
        ids: list[int] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids


def load_tokenizer(directory: Path) -> PromptTokenizer:
    """The tokenizer in `directory`; raises CheckpointError when there is none or it cannot be read."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"There is no tokenizer.json in {directory}; use a checkpoint that has one.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}.") from error
    # A file may carry the settings of its training; prompts are never cut or filled.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special_tokens = _special_tokens(read_json(directory / "tokenizer_config.json"))
    eos = _eos_token_ids(tokenizer, special_tokens, read_json(directory / "generation_config.json"))
    return PromptTokenizer(tokenizer, special_tokens, eos)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file; raises CheckpointError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _eos_token_ids(tokenizer: Tokenizer, special_tokens: dict[str, str], config: dict[str, Any]) -> frozenset[int]:
    stated = config.get("eos_token_id")
    ids = set(stated) if isinstance(stated, list) else {stated}
    ids.add(tokenizer.token_to_id(special_tokens.get("eos_token", "")))
    return frozenset(token_id for token_id in ids if type(token_id) is int)


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """The most characters of normalized text that one token can stand for; None when there is no such bound."""
    spec = json.loads(tokenizer.to_str())
    model = spec["model"]
    # An unknown token may stand for a run of any length, and some pre-tokenizers and tokens swallow white space.
    if model["type"] != "BPE" or (model.get("fuse_unk") and not model.get("byte_fallback")):
        return None
    if not _keeps_every_character(spec.get("pre_tokenizer")):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in spec.get("added_tokens", ())):
        return None
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=None)


def _keeps_every_character(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    match pre_tokenizer["type"]:
        case "Sequence":
            return all(map(_keeps_every_character, pre_tokenizer["pretokenizers"]))
        case "Split":
            return bool(pre_tokenizer["behavior"] != "Removed")
        case "ByteLevel" | "Metaspace" | "Digits":
            return True
        case _:
            return False
