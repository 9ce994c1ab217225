"""What crosses the border between server and engine: plain values, no tensors, no text.

The engine speaks token ids only. Times are seconds; sizes are bytes; every value is immutable.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from anybit.engine.precision import Precision


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop token was sampled (or, decided by the server, a stop string appeared)
    LENGTH = "length"  # max_tokens or the context length was reached
    ABORT = "abort"  # the client left or cancelled
    ERROR = "error"  # this row failed; its neighbours did not


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. All bounds are checked by the server before this value exists."""

    max_tokens: int  # 0 computes the prompt only
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    min_p: float = 0.0  # keeps tokens at least this share as likely as the likeliest
    presence_penalty: float = 0.0  # taken from the logit of every token generated before
    frequency_penalty: float = 0.0  # and this for every time it was
    repetition_penalty: float = 1.0  # divides the logits of tokens in prompt or answer (multiplies negative ones)
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # report each token's log probability and those of this many likeliest tokens
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens after the first


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to complete: `len(prompt_token_ids) >= 1` and prompt + max_tokens fit `max_model_len`.

    Only requests with the same `cache_salt` share the KV pages of equal prompts. `kv_format` None is the server's default.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    precision: Precision
    cache_salt: str = ""
    kv_format: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability (natural) under the model itself: before temperature, penalties and biases."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the likeliest token ids with theirs, in descending order


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one sequence, in order. The last event of a sequence carries `finish_reason`.

    A stop token that ended the sequence is not among `token_ids`. `queue_seconds` (arrival to first schedule),
    `prefill_seconds` (first schedule to first token) and `num_cached_tokens` (of the prompt, found in the prefix cache)
    come once, with the first token; the times are measured inside the engine. `logprobs` has an entry per token and
    `prompt_logprobs` one for each of the prompt's next tokens after the first, where they were asked for.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    num_cached_tokens: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class WidthInfo:
    """What one served width costs. Bits count the float parts (FORMATS: bit accounting)."""

    bit_width: int
    effective_bits: float  # linears only
    effective_bits_with_head: float  # with embedding and LM head at their own width
    bytes_read_per_token: int  # weight bytes one decode step reads, LM head included
    equivalent_bytes: int  # what a separate checkpoint of this width alone would hold resident
    perplexity: float | None = None  # as recorded in the checkpoint's manifest


@dataclass(frozen=True, slots=True)
class KVFormatInfo:
    """What keys and values cost in one format. The start-up check has put `raised_layers` into 8 bits."""

    name: str
    bytes_per_token: float
    capacity_tokens: int
    raised_layers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine serves; constant from the moment it is ready."""

    name: str
    checkpoint: str  # directory
    checkpoint_hash: str  # hex SHA-256 of the manifest
    method: str
    source: str
    widths: list[WidthInfo]
    default_bit_width: int
    lm_head_bits: int
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    eos_token_ids: list[int]
    weights_bytes: dict[str, int]  # kind ("linear", "embedding", "norm") -> resident bytes
    kv_formats: list[KVFormatInfo]  # that of requests which name none first
    device: str
    compute_dtype: str
    reproducible: bool
    load_seconds: float

    @property
    def bit_widths(self) -> list[int]:
        return [width.bit_width for width in self.widths]

    @property
    def kv_format(self) -> str:
        return self.kv_formats[0].name


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine, sent after steps and at least every second while idle. Counters only grow."""

    running: dict[int, int] = field(default_factory=dict)  # bit-width -> sequences being decoded or prefilled
    waiting: dict[int, int] = field(default_factory=dict)  # bit-width -> sequences not yet scheduled
    kv_pages_total: int = 0
    kv_pages_used: int = 0
    kv_bytes_total: dict[str, int] = field(default_factory=dict)  # KV format -> bytes of all its pages
    kv_bytes_used: dict[str, int] = field(default_factory=dict)
    kv_bytes_cached: dict[str, int] = field(default_factory=dict)  # of ended sequences, for those that begin alike
    prefix_queried_tokens: int = 0  # prompt tokens looked up in the prefix cache since start
    prefix_hit_tokens: int = 0  # those found there
    preemptions: int = 0  # sequences that lost their pages to older ones and were computed again
    sealed_pages: dict[str, int] = field(default_factory=dict)  # KV format -> pages of tokens encoded since start
    seal_seconds: dict[str, float] = field(default_factory=dict)  # KV format -> time that took
    steps: int = 0
    step_tokens: list[int] = field(default_factory=list)  # tokens of each step since the previous snapshot
    weight_bytes_read: dict[int, int] = field(default_factory=dict)  # bit-width -> bytes since start
    kernel_fallbacks: dict[str, int] = field(default_factory=dict)  # "kernel:reason" -> calls since start
    resident_bytes: int = 0  # resident set size of the engine process
    device_memory: dict[str, int] = field(default_factory=dict)  # kind -> bytes that the engine holds of its device
    device_free_bytes: int = 0  # that nobody holds


class EngineState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STALLED = "stalled"  # work is waiting and the engine has not reported for too long
    LOST = "lost"  # the engine process ended


@dataclass(frozen=True, slots=True)
class EngineHealth:
    state: EngineState
    detail: str = ""  # one sentence when the state is STALLED or LOST
    seconds_since_heartbeat: float = 0.0
