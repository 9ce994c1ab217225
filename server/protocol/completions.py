"""Request and response of /v1/completions."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema, model_validator

from anybit.server.protocol.common import MAX_CHOICES, MAX_FAN_OUT, FinishReasonName, GenerationFields, Usage
from anybit.server.protocol.text import PROMPT_SCHEMA, Prompt, parse_prompts, wrong
from anybit.server.protocol.unsupported import COMPLETION_FIELDS

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]] = COMPLETION_FIELDS

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)]
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

    @property
    def num_sequences(self) -> int:
        return len(self.prompt) * self.num_choices


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
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
