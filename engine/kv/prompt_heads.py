"""What attention sees of a short text: queries, keys and values of each layer, as caches in sealed formats are set up by."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from anybit.engine.batch import plan_batch
from anybit.engine.chunk import Chunk
from anybit.engine.models.decoder import Decoder
from anybit.engine.precision import Precision
from anybit.engine.sequence import Sequence as TokenSequence
from anybit.engine.types import GenerationRequest, SamplingParams
from anybit.kvcache.pool import KVPool
from anybit.kvcache.spec import PAGE_SIZE, KVSpec

MOST_TOKENS = 8 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """One layer's queries [heads, tokens, head_dim], keys and values [kv_heads, tokens, head_dim], after norms and rotary
    embedding; float32, on the CPU."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]


def prompt_tokens(directory: Path, max_positions: int) -> list[int]:
    """The first tokens, up to MOST_TOKENS, of a page of Lewis Carroll's Alice's Adventures in Wonderland (1865, in the
    public domain), by the checkpoint's tokenizer."""
    text = (importlib.resources.files("anybit.engine.kv") / "prompt.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return token_ids[: min(MOST_TOKENS, max_positions)]


@torch.inference_mode()
def read_heads(decoder: Decoder, token_ids: Sequence[int], bit_width: int) -> list[LayerHeads]:
    """Of each layer, from a pass over the tokens that reads the weights at `bit_width` and nothing from sealed pages."""
    config = decoder.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim)
    pool = KVPool(spec, spec.pages_for(len(token_ids)), decoder.device)
    request = GenerationRequest("heads", list(token_ids), SamplingParams(max_tokens=1), Precision(bit_width))
    sequence = TokenSequence(request, arrived_at=0.0, pages=list(range(pool.num_pages)))
    plan = plan_batch([Chunk(sequence, len(token_ids))], decoder.device)
    found = []
    hidden = decoder.embed(plan.token_ids).to(decoder.dtype)
    for layer in decoder.layers:
        heads = layer.attention.heads(layer.attention_norm(hidden), plan)
        found.append(LayerHeads(*(rows.transpose(0, 1).to("cpu", torch.float32, copy=True) for rows in heads)))
        hidden = layer(hidden, plan, pool)
    return found
