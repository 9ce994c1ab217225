"""Messages to prompt text, with the chat template of the checkpoint and never with one from a request."""

import json
import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anybit.engine.errors import CheckpointError
from anybit.server.errors import InvalidRequestError, shorten
from anybit.server.tokenizer import read_json

logger = logging.getLogger("anybit.server")

MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024
MAX_RENDER_SECONDS = 10.0


class ChatTemplate:
    """A compiled template; `source` None stands for a checkpoint without one."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        self._special_tokens = special_tokens
        self._problem = "This model has no chat template; use /v1/completions."
        self._template = None
        if source is None:
            return
        try:
            self._template = _environment().from_string(source)
        except (TemplateSyntaxError, RecursionError) as error:
            logger.warning("the chat template of the checkpoint cannot be compiled: %s", error)
            self._problem = "The chat template of this model is broken; use /v1/completions."

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt that asks for the next assistant message; raises InvalidRequestError.

        Size and time are bounded, because the template is a program that came with the checkpoint.
        """
        if self._template is None:
            raise InvalidRequestError(self._problem, param="messages", code="chat_template_missing")
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS or time.monotonic() > deadline:
                    raise _failure("it produces too much text or takes too long")
        except _TemplateRefusalError as error:
            raise _failure(shorten(str(error))) from None
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise anything
            logger.warning("the chat template failed: %s: %s", type(error).__name__, error)
            raise _failure("it does not fit them") from None
        return "".join(pieces)


def load_chat_template(directory: Path, special_tokens: dict[str, str]) -> ChatTemplate:
    """The chat template in `directory`, from chat_template.jinja or else tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not valid UTF-8.") from error
    source = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return ChatTemplate(source if isinstance(source, str) else None, special_tokens)


class _TemplateRefusalError(TemplateError):
    """The template itself refused the messages."""


def _failure(why: str) -> InvalidRequestError:
    message = f"The chat template of this model refused these messages: {why.rstrip('.')}."
    return InvalidRequestError(message, param="messages", code="chat_template_failed")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a trainer learns from; in a prompt it means nothing but its content."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    # Jinja's own tojson escapes for HTML, which no model was trained on.
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise _TemplateRefusalError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
