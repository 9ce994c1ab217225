"""The tokenizer that a GGUF file describes, as Hugging Face's files.

Made here from the file's own vocabulary rather than by Transformers, whose conversion changes from release to release
and takes a splitting that it does not know for GPT-2's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from anybit.engine.errors import AnyBitError, SourceError, UnsupportedModelError
from anybit.engine.weights.gguf_metadata import GGUFMetadata
from anybit.engine.weights.source import first_sentence

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
# End-of-generation markers by text, for files that name only one of theirs.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """What `tokenizer.ggml.pre` stands for: the text is cut by one pattern after the other."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges make of it
    adds_bos: bool = False  # where the file does not say
    composes: bool = False  # characters are composed first (NFC)


_DIGIT_BY_DIGIT = _Splitting((r"\p{N}", _GPT2))
_LLAMA3 = _Splitting((_GPT4 % r"\p{N}{1,3}",), ignore_merges=True, adds_bos=True)
_QWEN2 = _Splitting((_GPT4 % r"\p{N}",), composes=True)
_SPLITTINGS = {
    "command-r": _DIGIT_BY_DIGIT,
    "dbrx": _Splitting((_GPT4 % r"\p{N}{1,3}",)),
    "deepseek-r1-qwen": _QWEN2,
    "default": _Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon3": _LLAMA3,
    "gpt-2": _Splitting((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "refact": _DIGIT_BY_DIGIT,
    "smaug-bpe": _Splitting((_GPT4 % r"\p{N}{1,3}",)),
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
    "tekken": _Splitting((_TEKKEN,), ignore_merges=True, adds_bos=True),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, what kind each is, and the ids of BOS, EOS, the unknown and the padding token where there are such."""

    tokens: list[str]
    kinds: list[int]
    special: dict[str, int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    def of_kind(self, *kinds: int) -> list[tuple[int, str]]:
        return [(number, self.tokens[number]) for number, kind in enumerate(self.kinds) if kind in kinds]


def write_tokenizer(metadata: GGUFMetadata, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, if any.

    UnsupportedModelError for a kind of tokenizer that is not known, SourceError for a broken one.
    """
    try:
        vocabulary = _vocabulary(metadata)
        tokenizer, adds_bos = _build(metadata, vocabulary)
        _add_tokens(tokenizer, vocabulary)
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos" in vocabulary.special
        adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos" in vocabulary.special
        _add_ends(tokenizer, vocabulary, adds_bos, adds_eos)
        tokenizer.save(str(directory / "tokenizer.json"))
    except AnyBitError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise SourceError(f"The tokenizer of {metadata.path} cannot be used: {first_sentence(error)}.") from error
    special = vocabulary.special
    config = {f"{name}_token": vocabulary.tokens[token_id] for name, token_id in special.items()}
    flags = {"add_bos_token": adds_bos, "add_eos_token": adds_eos, "clean_up_tokenization_spaces": False}
    _write_json(directory / "tokenizer_config.json", {**config, **flags, "tokenizer_class": "PreTrainedTokenizerFast"})
    generation = {"bos_token_id": special.get("bos"), "eos_token_id": _end_ids(metadata, vocabulary)}
    _write_json(directory / "generation_config.json", generation)
    template = metadata.get("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _vocabulary(metadata: GGUFMetadata) -> _Vocabulary:
    tokens = metadata.require("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise SourceError(f"The tokenizer of {metadata.path} has {len(tokens)} tokens and {len(kinds)} types of them.")
    # SentencePiece files need not name the three that its training gives the first ids.
    implied = {"unk": 0, "bos": 1, "eos": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", implied.get(name)) for name, key in keys.items()}
    special = {name: token_id for name, token_id in ids.items() if token_id is not None}
    for name, token_id in special.items():
        if not 0 <= token_id < len(tokens):
            raise SourceError(f"The {name} token {token_id} of {metadata.path} is outside its vocabulary.")
    return _Vocabulary(tokens, kinds, special)


def _build(metadata: GGUFMetadata, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """The tokenizer without its added tokens, and whether its kind begins a text with BOS."""
    kind = metadata.require("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(metadata, vocabulary), True
    if kind == "gpt2":
        # Files from before the entry existed: what llama.cpp takes them for.
        name = metadata.get("tokenizer.ggml.pre", "default")
        splitting = _SPLITTINGS.get(name)
        if splitting is None:
            raise UnsupportedModelError(f"The splitting of text {name!r} of {metadata.path} is not supported.")
        return _byte_level(metadata, vocabulary, splitting), splitting.adds_bos
    raise UnsupportedModelError(f"The tokenizer kind {kind!r} of {metadata.path} is not supported; use gpt2 or llama.")


def _byte_level(metadata: GGUFMetadata, vocabulary: _Vocabulary, splitting: _Splitting) -> Tokenizer:
    pairs = [merge.partition(" ") for merge in metadata.require("tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=splitting.ignore_merges))
    if splitting.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: GGUFMetadata, vocabulary: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: neighbours merge to the token of the highest score; what is no token becomes bytes."""
    merges = _merges(vocabulary, metadata.require("tokenizer.ggml.scores"))
    unknown = vocabulary.tokens[vocabulary.special["unk"]]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that make up a third, best score first; of one token's, the one with the longest left part."""
    ids = vocabulary.ids
    merges = []
    for token_id, token in vocabulary.of_kind(_NORMAL):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-scores[token_id], left, right))
    merges.sort(key=lambda merge: merge[0])  # stable: keeps the order of one token's
    return [(left, right) for _, left, right in merges]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens that are found in a text before it is split: markers, and pieces such as runs of spaces."""
    markers = vocabulary.of_kind(_CONTROL, _UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for _, token in markers])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for _, token in vocabulary.of_kind(_USER_DEFINED)])


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, bos: bool, eos: bool) -> None:
    """Put BOS before every text and EOS behind it, where wanted."""
    first = [vocabulary.special["bos"]] if bos else []
    last = [vocabulary.special["eos"]] if eos else []
    if first or last:
        texts = {token_id: vocabulary.tokens[token_id] for token_id in (*first, *last)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(texts[token_id] for token_id in first), "$A", *(texts[token_id] for token_id in last)],
            special_tokens=[(text, token_id) for token_id, text in texts.items()],
        )


def _end_ids(metadata: GGUFMetadata, vocabulary: _Vocabulary) -> list[int]:
    stated = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    marks = (number for number, token in vocabulary.of_kind(_CONTROL, _USER_DEFINED) if token in _END_TOKENS)
    ends = [vocabulary.special.get("eos"), *stated, *marks]
    return list(dict.fromkeys(token_id for token_id in ends if token_id is not None))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
