"""Log probabilities in the two shapes of OpenAI's API."""

from dataclasses import dataclass
from typing import Any

from anybit.engine.types import TokenLogprob
from anybit.server.token_text import TokenTexts


@dataclass(frozen=True, slots=True)
class ReportedToken:
    """A token of an answer; `logprob` is None for the first token of a prompt, which nothing predicts."""

    token_id: int
    text_offset: int  # characters of the answer's text before it
    logprob: TokenLogprob | None


def report_tokens(
    token_ids: list[int], logprobs: list[TokenLogprob], offset: int, texts: TokenTexts, hidden: frozenset[int]
) -> list[ReportedToken]:
    """Tokens with their places in a text that begins at `offset`; the ids in `hidden` add nothing to it.

    When there is one log probability less than tokens, the first token has none.
    """
    reported = []
    entries: list[TokenLogprob | None] = [None] * (len(token_ids) - len(logprobs)) + list(logprobs)
    for token_id, entry in zip(token_ids, entries, strict=True):
        reported.append(ReportedToken(token_id, offset, entry))
        offset += 0 if token_id in hidden else texts.num_characters(token_id)
    return reported


def completion_logprobs(tokens: list[ReportedToken], texts: TokenTexts) -> dict[str, Any]:
    """The shape of /v1/completions: parallel lists."""
    return {
        "tokens": [texts.text_of(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else token.logprob.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_text(token.logprob, texts) for token in tokens],
        "text_offset": [token.text_offset for token in tokens],
    }


def chat_logprobs(tokens: list[ReportedToken], texts: TokenTexts) -> dict[str, Any]:
    """The shape of /v1/chat/completions: one object per token."""
    return {
        "content": [
            {
                **_chat_entry(token.token_id, token.logprob.logprob, texts),
                "top_logprobs": [_chat_entry(token_id, value, texts) for token_id, value in token.logprob.top],
            }
            for token in tokens
            if token.logprob is not None
        ],
        "refusal": None,
    }


def _by_text(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of two tokens with one text the likelier counts."""
    values: dict[str, float] = {}
    for token_id, value in [*entry.top, (entry.token_id, entry.logprob)]:
        values.setdefault(texts.text_of(token_id), value)
    return values


def _chat_entry(token_id: int, value: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.text_of(token_id), "logprob": value, "bytes": list(texts.bytes_of(token_id))}
