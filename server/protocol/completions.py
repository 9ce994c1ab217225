"""Request and response of /v1/completions."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from anybit.server.protocol.common import (
    MAX_CHOICES,
    MAX_FAN_OUT,
    MAX_LOGPROBS,
    MAX_TOKENS_BOUND,
    FinishReasonName,
    GenerationFields,
    Usage,
)
from anybit.server.protocol.text import PROMPT_SCHEMA, Prompt, parse_prompts, wrong
from anybit.server.protocol.unsupported import COMPLETION_FIELDS

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]] = COMPLETION_FIELDS

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_BOUND)] | None = Field(
        default=None, description="0 is possible together with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = Field(
        default=None, description="Report each token's log probability and those of so many likeliest tokens."
    )
    echo: bool | None = Field(
        default=None, description="Put the prompt before the answer; with logprobs its tokens are scored too."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=None, description="Accepted up to n; choosing among more candidates than are returned is not supported."
    )

    @model_validator(mode="after")
    def _check_fan_out(self) -> Self:
        if self.best_of is not None and self.best_of > self.num_choices:
            raise wrong("best_of above n is not supported by this version; leave it out.", "best_of")
        if self.num_sequences > MAX_FAN_OUT:
            raise wrong(
                f"{len(self.prompt)} prompts times n={self.num_choices} are {self.num_sequences} answers; "
                f"one request takes at most {MAX_FAN_OUT}.",
                "n",
            )
        return self

    @model_validator(mode="after")
    def _check_zero_tokens(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens=0 asks for nothing; it has a meaning only together with echo=true.", "max_tokens")
        return self

    @property
    def num_sequences(self) -> int:
        return len(self.prompt) * self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        return None if self.logprobs is False else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.num_logprobs if self.echo else None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName


class CompletionResponse(BaseModel):
    """Answer of POST /v1/completions; in a stream every event holds the same fields."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
