"""One way of reading a model, and its passes over known tokens."""

import math
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.kv.sealed_setup import SealedSetup
from anybit.engine.models.decoder import Decoder
from anybit.engine.precision import Precision
from anybit.engine.sequence import Sequence as TokenSequence
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import SealedPool
from anybit.kvcache.spec import PAGE_SIZE, KVSpec


@dataclass(slots=True, eq=False)
class Variant:
    """One way of reading a model: a decoder at a width, with totals that grow as text is scored.

    `setup` says how sealed formats keep the model.
    """

    label: str
    decoder: Decoder
    bit_width: int
    kv_format: str
    effective_bits: float
    scheme: str = "nested"
    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    seconds: float = 0.0
    setup: SealedSetup | None = field(default=None, repr=False)
    pool: KVPool | None = field(default=None, repr=False)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / max(self.tokens, 1), 700.0))


def start_sequence(token_ids: Sequence[int], variant: Variant, room: int = 0) -> TokenSequence:
    """A sequence of known tokens at the start of the variant's own, fresh cache, with room for so many more."""
    variant.pool = _pool_for(variant, len(token_ids) + room)
    request = GenerationRequest("evaluate", list(token_ids), SamplingParams(max_tokens=1), Precision(variant.bit_width))
    sequence = TokenSequence(request, arrived_at=0.0, kv_format=variant.kv_format)
    sealed = variant.pool.sealed.get(variant.kv_format)
    sequence.pages = list(range(variant.pool.num_pages if sealed is None else sealed.num_pages))
    return sequence


def branch_sequence(sequence: TokenSequence, token_ids: Sequence[int]) -> TokenSequence:
    """The sequence with other tokens after those it has computed, in the same pages: of several branches the newest
    overwrites what the one before it wrote there."""
    branch = copy(sequence)
    branch.token_ids = [*sequence.token_ids[: sequence.num_computed], *token_ids]
    return branch


def next_log_probabilities(variant: Variant, sequence: TokenSequence, count: int, last: int | None = None) -> Tensor:
    """Log probabilities after each of the sequence's next `count` tokens, or the `last` of these: float32 [rows, vocab]."""
    started = time.perf_counter()
    if variant.pool is not None and variant.pool.sealed:
        sequence.own_slots = list(range(sequence.num_computed // PAGE_SIZE, variant.pool.num_pages))
    plan = plan_batch([Chunk(sequence, count)], variant.decoder.device)
    if variant.pool is None:
        raise ValueError("The sequence was not started with start_sequence.")
    hidden = variant.decoder.forward(plan, variant.pool)
    log_probs = torch.log_softmax(variant.decoder.logits(hidden[count - (last or count) :]), -1)
    sequence.num_computed += count
    if log_probs.is_cuda:
        torch.cuda.synchronize()
    variant.seconds += time.perf_counter() - started
    return log_probs


def _pool_for(variant: Variant, num_tokens: int) -> KVPool:
    config = variant.decoder.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, variant.kv_format)
    num_exact = -(-num_tokens // PAGE_SIZE)
    if variant.pool is not None and variant.pool.num_pages >= num_exact:
        return variant.pool
    device = variant.decoder.device
    if spec.is_exact:
        return KVPool(spec, num_exact, device)
    weights = None
    if variant.setup is not None:
        spec, weights = variant.setup.specs[spec.format], variant.setup.key_weights
    sealed = SealedPool(spec, spec.pages_for(num_tokens), weights, device)
    return KVPool(spec.of_format(OWN_FORMAT), num_exact, device, {spec.format: sealed})
