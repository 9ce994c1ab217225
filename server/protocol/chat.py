"""Request and response of /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from anybit.server.errors import shorten
from anybit.server.protocol.common import MAX_LOGPROBS, FinishReasonName, GenerationFields, RequestModel, Usage
from anybit.server.protocol.text import check_text, wrong
from anybit.server.protocol.unsupported import CHAT_FIELDS, MESSAGE_FIELDS, drop_neutral

MAX_MESSAGES = 4096

_TEXT_PART_SCHEMA = {
    "type": "object",
    "required": ["type", "text"],
    "additionalProperties": False,
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _TEXT_PART_SCHEMA}, {"type": "null"}]
}


def parse_content(value: Any) -> str | None:
    """The text of a message: a string, or text parts joined by newlines; None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list) or not value:
        raise wrong("content must be a string or a list of text parts.")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise wrong('A content part must look like {"type": "text", "text": "..."}.')
    if kind != "text":
        raise wrong(f"Content of type '{shorten(kind)}' is not supported; send text parts only.")
    text = part.get("text")
    if not isinstance(text, str) or len(part) != 2:
        raise wrong('A content part must look like {"type": "text", "text": "..."}.')
    return check_text(text)


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, PlainValidator(parse_content), WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("role") in ("tool", "function"):
            raise wrong(f"Messages of role '{value['role']}' are not supported by this version.")
        return drop_neutral(value, MESSAGE_FIELDS, "messages.")

    @model_validator(mode="after")
    def _check_content(self) -> "ChatMessage":
        # A client that replays an answer without text sends null; from anybody else it is a mistake.
        if self.content is None and self.role != "assistant":
            raise wrong(f"A message of role '{self.role}' needs a content.")
        if self.name is not None:
            check_text(self.name)
        return self

    @property
    def template_form(self) -> dict[str, str]:
        """The message as a chat template sees it; templates know no developer role."""
        fields = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        return fields if self.name is None else {**fields, "name": self.name}


class ChatRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]] = CHAT_FIELDS

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = Field(default=None, description="Report each token's log probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description="And those of so many likeliest tokens; needs logprobs=true."
    )

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs has a meaning only together with logprobs=true.", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName


class ChatResponse(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
