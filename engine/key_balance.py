"""Balance weights of a model's keys, estimated from what its attention does with a short text."""

import importlib.resources
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.batch import BatchPlan, plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.models.decoder import Decoder
from anybit.engine.precision import Precision
from anybit.engine.sequence import Sequence as TokenSequence
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.kvcache.codec.balance import balance_weights
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import PAGE_SIZE, KVSpec

logger = logging.getLogger("anybit.engine")

LEAST_TOKENS = PAGE_SIZE
MOST_TOKENS = 8 * PAGE_SIZE


def _text() -> str:
    """A page of Lewis Carroll's Alice's Adventures in Wonderland (1865), which is in the public domain."""
    return (importlib.resources.files("anybit.engine") / "key_balance.txt").read_text(encoding="utf-8")


def key_weights(directory: Path, decoder: Decoder, bit_width: int, max_positions: int) -> list[Tensor] | None:
    """`estimate_balance` from that page, read by the checkpoint's tokenizer; None where the context is too short for it."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    token_ids = tokenizer.encode(_text(), add_special_tokens=False).ids[: min(MOST_TOKENS, max_positions)]
    if len(token_ids) < LEAST_TOKENS:
        logger.warning("Keys are kept without balance weights: there are %d tokens to estimate them.", len(token_ids))
        return None
    weights = estimate_balance(decoder, token_ids, bit_width)
    logger.info("Balance weights of the keys were estimated from %d tokens.", len(token_ids))
    return weights


@torch.inference_mode()
def estimate_balance(decoder: Decoder, token_ids: Sequence[int], bit_width: int) -> list[Tensor]:
    """Weights [kv_heads, head_dim] of each layer (`balance_weights`) from up to MOST_TOKENS tokens, LEAST_TOKENS at least.

    They decide how well pages are kept and nothing else, so the model's own reading at `bit_width` is good enough.
    """
    config = decoder.config
    token_ids = list(token_ids[:MOST_TOKENS])
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim)
    pool = KVPool(spec, spec.pages_for(len(token_ids)), decoder.device)
    request = GenerationRequest("balance", token_ids, SamplingParams(max_tokens=1), Precision(bit_width))
    sequence = TokenSequence(request, arrived_at=0.0, pages=list(range(pool.num_pages)))
    plan = plan_batch([Chunk(sequence, len(token_ids))], decoder.device)
    return [balance_weights(_by_head(q), _by_head(k)) for q, k in _queries_and_keys(decoder, plan, pool)]


def _queries_and_keys(decoder: Decoder, plan: BatchPlan, pool: KVPool) -> list[tuple[Tensor, Tensor]]:
    found = []
    hidden = decoder.embed(plan.token_ids).to(decoder.dtype)
    for layer in decoder.layers:
        q, k, _ = layer.attention.heads(layer.attention_norm(hidden), plan)
        found.append((q, k))
        hidden = layer(hidden, plan, pool)
    return found


def _by_head(rows: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [1, heads, tokens, head_dim] on the CPU, as `balance_weights` takes them."""
    return rows.float().transpose(0, 1)[None].cpu()
