"""One request's way through the engine."""

from dataclasses import dataclass, field

from anybit.engine.types import GenerationRequest
from anybit.kvcache.formats import is_exact
from anybit.kvcache.prefix import PageKeys
from anybit.kvcache.spec import PAGE_SIZE


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and progress of one request.

    `num_computed` tokens have their keys and values in `pages`; the sequence is in prefill until only its newest token
    is missing there. A preempted sequence has no pages and computes all its tokens again. Of a sealed format, the first of
    `pages` keeps the first tokens exactly, and `own_slots` are the exact pages that it writes in, from the page of token
    `num_computed` on. `num_scored` of the prompt's
    tokens after the first have their log probabilities reported. `draws_from_all`: a draw of it took a sort of all
    logits, so others may. Times are seconds of one monotonic clock.
    """

    request: GenerationRequest
    arrived_at: float
    token_ids: list[int] = field(init=False)
    kv_format: str = "bf16"
    pages: list[int] = field(default_factory=list)
    own_slots: list[int] = field(default_factory=list)
    page_keys: PageKeys | None = None  # None: neither uses nor feeds the prefix cache
    arrival_number: int = 0
    num_computed: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at the first admission
    num_scored: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    draws_from_all: bool = False

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

    def page_of(self, position: int) -> int:
        """The exact page that the token at a position, not computed yet, is written to."""
        page = position // PAGE_SIZE
        return self.pages[page] if is_exact(self.kv_format) else self.own_slots[page - self.num_computed // PAGE_SIZE]

    @property
    def max_tokens_cached(self) -> int:
        """Most tokens the sequence can ever have in the cache: the last sampled token never enters it."""
        return self.num_prompt_tokens + max(self.request.sampling.max_tokens, 1) - 1

    @property
    def is_near_limit(self) -> bool:
        """Whether the next token is the last one that may be generated."""
        return self.num_generated + 1 >= self.request.sampling.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.num_prompt_logprobs is not None

    @property
    def has_unscored_prompt(self) -> bool:
        """Whether log probabilities of the prompt's tokens are wanted and still to be found."""
        return self.wants_prompt_logprobs and self.num_computed + 1 < self.num_prompt_tokens

    @property
    def bit_width(self) -> int:
        return self.request.precision.bit_width
