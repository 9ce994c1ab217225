"""One request's way through the engine."""

from dataclasses import dataclass, field

from anybit.engine.types import FinishReason, GenerationRequest


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request.

    `num_computed` tokens have their keys and values in `pages`; the sequence is in prefill until only its newest token
    is missing there. Times are seconds of one monotonic clock.
    """

    request: GenerationRequest
    arrived_at: float
    token_ids: list[int] = field(init=False)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens_cached(self) -> int:
        """Most tokens the sequence can ever have in the cache: the last sampled token never enters it."""
        return self.num_prompt_tokens + self.request.sampling.max_tokens - 1

    @property
    def bit_width(self) -> int:
        return self.request.precision.bit_width
