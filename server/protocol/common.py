"""What completions and chat have in common: sampling fields, usage, errors and model cards."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from anybit.server.protocol.text import LOGIT_BIAS_SCHEMA, STOP_SCHEMA, parse_logit_bias, parse_stop, wrong

MAX_CHOICES = 16
MAX_FAN_OUT = 64  # sequences of one request: prompts times n
MAX_TOKENS_BOUND = 16_777_216
MAX_LOGPROBS = 20

FinishReasonName: TypeAlias = Literal["stop", "length"]


class RequestModel(BaseModel):
    """A request body: unknown fields are refused and no value is converted into another type."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]] = {}


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(RequestModel):
    """The fields of every generating request. Null means "not given"."""

    model: Annotated[str, Field(max_length=512)] | None = Field(
        default=None, description="The served model, or an alias such as `name@4bit`; the served model when not given."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS_BOUND)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS_BOUND)] | None = Field(
        default=None, description="The same as max_tokens."
    )
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=16_777_216)] | None = Field(default=None, description="-1 and 0 turn it off.")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Keeps tokens at least this share as likely as the likeliest."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None, description="Above 1, tokens of the prompt and of the answer become less likely; 1 turns it off."
    )
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_logit_bias), WithJsonSchema(LOGIT_BIAS_SCHEMA)] = (
        Field(default={}, description="Token id to what is added to its logit, from -100 to 100.")
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop), WithJsonSchema(STOP_SCHEMA)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(default=None, description="Go on past the model's end-of-text tokens.")
    bit_width: (
        Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": 16})]
        | Annotated[str, Field(max_length=64)]
        | None
    ) = Field(
        default=None, description='Bits of each weight to read, or "at-least-4"; the same as the header X-Bit-Width.'
    )
    kv_format: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="Format of the KV cache; the same as the header X-KV-Format."
    )
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        default=None,
        description="Only requests with the same salt share cached prompts; keep it secret to share with none.",
    )
    user: Annotated[str, Field(max_length=4096)] | None = Field(default=None, description="Accepted and not used.")
    safety_identifier: Annotated[str, Field(max_length=4096)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=4096)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options has a meaning only together with stream=true.", "stream_options")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens and max_completion_tokens are two names of one limit; send one.", "max_tokens")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine will be asked for."""
        return self.num_choices

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None: no log probabilities at all."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt's tokens."""
        return None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens whose keys and values were cached already.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    bit_width: int = Field(description="Bits of each weight that this answer read.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Preparing(BaseModel):
    method: str
    stage: str = Field(description="Stages follow one another; in 'load' the new weights are being loaded.")
    progress: float = Field(description="Share of this stage, 0 to 1.")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    bit_width: int
    effective_bits: float = Field(description="Bits per weight of the linear layers, scales included.")
    max_model_len: int
    bytes_read_per_token: int = Field(description="Weight bytes that one decoding step reads.")
    method: str = Field(description="How the weights that answer now were quantized.")
    preparing: Preparing | None = Field(description="What takes their place when it is ready; null: nothing.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    status: str


class VersionInfo(BaseModel):
    version: str
    model: str
    method: str | None = Field(description="How the weights were quantized; null while loading.")
    reproducible: bool | None = Field(description="Whether answers do not depend on neighbours; null while loading.")
    bit_widths: list[int]
    default_bit_width: int | None
    kv_format: str | None
    kv_formats: list[str] = Field(description="All that requests can name.")
    kv_layers_raised: dict[str, list[int]] = Field(
        description="By format the layers that the start-up check has put into 8 bits; formats without any are left out."
    )
    device: str | None
    compute_dtype: str | None
