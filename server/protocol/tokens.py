"""Requests and responses of /tokenize and /detokenize."""

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from anybit.server.protocol.chat import MAX_MESSAGES, ChatMessage
from anybit.server.protocol.common import RequestModel
from anybit.server.protocol.text import MAX_TOKEN_ID, check_text, wrong

MAX_TOKEN_IDS = 1_000_000


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize: a text, or a conversation as the chat endpoint would render it."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Whether a text gets the tokens that a completion's prompt gets; true if not given."
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("Send either prompt or messages.", "prompt")
        if self.messages is not None and self.add_special_tokens is not None:
            raise wrong("add_special_tokens is for a prompt; the chat template writes its own.", "add_special_tokens")
        if self.prompt is not None:
            check_text(self.prompt)
        return self


class TokenizeResponse(BaseModel):
    """Answer of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=MAX_TOKEN_IDS)]


class DetokenizeResponse(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str
