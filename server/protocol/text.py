"""Text and token ids as they arrive in a request, checked before anything else looks at them."""

from typing import Any, TypeAlias

from pydantic_core import PydanticCustomError

Prompt: TypeAlias = str | list[int]

MAX_PROMPTS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100


def wrong(sentence: str, param: str | None = None) -> PydanticCustomError:
    """A validation failure whose message is `sentence` as it stands.

    `param` names the field where the failure lies in several fields together.
    """
    # The template is formatted by pydantic, so braces in it would be taken for placeholders.
    return PydanticCustomError("sentence", "{sentence}", {"sentence": sentence, "param": param})


def check_text(text: str) -> str:
    """`text`, if UTF-8 can encode it; JSON escapes can spell half a surrogate pair, which is no character."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise wrong("The text holds half of a surrogate pair; send valid Unicode.") from None
    return text


def parse_prompts(value: Any) -> list[Prompt]:
    """The prompts of a completions request: a text, token ids, or a list of either; none may be empty."""
    if isinstance(value, str):
        return [_check_prompt_text(value)]
    if not isinstance(value, list):
        raise wrong("The prompt must be a string, a list of strings, a list of token ids or a list of such lists.")
    if not value:
        raise wrong("The prompt is empty; send at least one token.")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [_check_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise wrong(f"There are {len(value)} prompts; one request takes at most {MAX_PROMPTS}.")
    if kinds == {str}:
        return [_check_prompt_text(text) for text in value]
    if kinds == {list}:
        return [_check_token_ids(ids) for ids in value]
    raise wrong("The list of prompts mixes kinds; send only strings, only token ids or only lists of token ids.")


def _check_prompt_text(text: str) -> str:
    if not text:
        raise wrong("The prompt is empty; send at least one token.")
    return check_text(text)


def _check_token_ids(ids: list[Any]) -> list[int]:
    if not ids:
        raise wrong("The prompt is empty; send at least one token.")
    if set(map(type, ids)) != {int}:
        raise wrong("A list of token ids must hold integers only.")
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise wrong(f"Token ids must lie between 0 and {MAX_TOKEN_ID}.")
    return ids


def parse_stop(value: Any) -> tuple[str, ...]:
    """The stop strings of a request: a text or a list of texts; null means none."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong("stop must be a string or a list of strings.")
    if len(texts) > MAX_STOP_STRINGS:
        raise wrong(f"There are {len(texts)} stop strings; one request takes at most {MAX_STOP_STRINGS}.")
    for text in texts:
        if not text:
            raise wrong("A stop string must not be empty.")
        if len(text) > MAX_STOP_CHARACTERS:
            raise wrong(f"A stop string must have at most {MAX_STOP_CHARACTERS} characters.")
        check_text(text)
    return tuple(dict.fromkeys(texts))


def parse_logit_bias(value: Any) -> dict[int, float]:
    """The biases of a request by token id, which JSON writes as a string; null means none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("logit_bias must be an object of token ids and numbers.")
    if len(value) > MAX_LOGIT_BIASES:
        raise wrong(f"There are {len(value)} biases; one request takes at most {MAX_LOGIT_BIASES}.")
    return {_bias_token(key): _bias(bias) for key, bias in value.items()}


def _bias_token(key: Any) -> int:
    if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
        raise wrong(f"The keys of logit_bias must be token ids between 0 and {MAX_TOKEN_ID}.")
    return int(key)


def _bias(value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:
        raise wrong(f"A bias must be a number between -{MAX_LOGIT_BIAS} and {MAX_LOGIT_BIAS}.")
    return float(value)


LOGIT_BIAS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
        },
        {"type": "null"},
    ]
}

PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}},
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
            "items": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
            },
        },
    ]
}

_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _STOP_STRING_SCHEMA,
        {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": _STOP_STRING_SCHEMA},
        {"type": "null"},
    ]
}
