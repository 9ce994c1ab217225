"""Fields that clients know and this version cannot honour: refused unless they ask for nothing.

A field ignored in silence gives an answer to another question than the one that was asked.
"""

from typing import Any

from anybit.server.errors import InvalidRequestError, shorten

# Field -> the values that ask for nothing; null always does.
_COMMON: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}

COMPLETION_FIELDS: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "suffix": ("",),
    "prompt_logprobs": (),
    "add_special_tokens": (True,),
}

CHAT_FIELDS: dict[str, tuple[Any, ...]] = {
    **_COMMON,
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}

MESSAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


def drop_neutral(fields: dict[str, Any], table: dict[str, tuple[Any, ...]], where: str = "") -> dict[str, Any]:
    """`fields` without those of `table` that ask for nothing; raises InvalidRequestError for one that asks."""
    present = fields.keys() & table.keys()
    if not present:
        return fields
    for name in sorted(present):
        value = fields[name]
        if value is not None and not any(type(value) is type(neutral) and value == neutral for neutral in table[name]):
            raise InvalidRequestError(
                f"The field '{name}' is not supported by this version{_advice(table[name])}.",
                param=shorten(where + name),
                code="unsupported_field",
            )
    return {name: value for name, value in fields.items() if name not in present}


def _advice(neutral: tuple[Any, ...]) -> str:
    return f" except as {neutral[0]!r}; leave it out" if neutral else "; leave it out"
