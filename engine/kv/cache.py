"""The KV cache that an engine serves from: its formats, how memory is shared among them, and the pages."""

from collections.abc import Callable, Sequence

import torch

from anybit.engine.config import AUTO_KV_FORMAT, ConfigError, EngineConfig
from anybit.engine.errors import AnyBitError
from anybit.engine.kv.default_format import exact_format, preferred_format
from anybit.engine.kv.sealed_setup import SealedSetup
from anybit.engine.machine import free_bytes
from anybit.engine.models.config import DecoderConfig
from anybit.engine.models.decoder import Decoder
from anybit.kvcache.allocator import PageAllocator
from anybit.kvcache.books import FormatPages, PageBooks
from anybit.kvcache.formats import is_rotated, parse_format
from anybit.kvcache.pool import KVPool
from anybit.kvcache.sealed_pool import SealedPool
from anybit.kvcache.slots import OwnSlots, slots_needed
from anybit.kvcache.spec import KVSpec

OWN_FORMAT = "bf16"
"""Of the exact pages in which sequences of sealed formats write."""

# A GPU serves nothing else; what stays free there is for activations. A machine's memory has other users.
_KV_SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.85}


def build_cache(
    config: EngineConfig,
    decoder: Decoder,
    max_model_len: int,
    device: torch.device,
    set_up: Callable[[Sequence[KVSpec]], SealedSetup],
) -> tuple[PageBooks, KVPool]:
    """Pages of all formats served, in equal parts of the memory for them.

    `set_up` is asked how to keep the model in sealed formats, if there are some. ConfigError if formats do not suit the
    model or each other, AnyBitError if there is too little memory.
    """
    default = config.kv_format
    if default == AUTO_KV_FORMAT:
        default = preferred_format(decoder)
    specs, setup = _set_up((default, *config.kv_formats), decoder.config, set_up)
    if config.kv_format == AUTO_KV_FORMAT and default in setup.doubts:
        default = exact_format(setup.doubts[default])
        specs, setup = _set_up((default, *config.kv_formats), decoder.config, set_up)
    exact = next((spec for spec in specs if spec.is_exact), specs[0].of_format(OWN_FORMAT))
    sealed = [spec for spec in specs if not spec.is_exact]
    num_seqs = config.num_seqs(device.type)
    num_slots = slots_needed(num_seqs, config.step_tokens(device.type)) if sealed else 0
    budget = config.kv_cache_bytes or int(free_bytes(device) * _KV_SHARE_OF_FREE[device.type])
    share = (budget - num_slots * exact.page_bytes) // len(specs)
    pages = {spec.format: _num_pages(spec, share, config, num_seqs, max_model_len) for spec in specs}
    num_exact = pages.get(exact.format, 0)
    pools = {name: SealedPool(spec, pages[name], setup.key_weights, device) for name, spec in setup.specs.items()}
    books = PageBooks(
        {spec.format: FormatPages(spec, PageAllocator(pages[spec.format])) for spec in specs},
        default,
        OwnSlots(num_exact, num_slots),
    )
    return books, KVPool(exact, num_exact + num_slots, device, pools)


def _set_up(
    names: Sequence[str], model: DecoderConfig, set_up: Callable[[Sequence[KVSpec]], SealedSetup]
) -> tuple[list[KVSpec], SealedSetup]:
    """Specs of the formats, each once, as they are to be served."""
    specs = [KVSpec(model.num_layers, model.num_kv_heads, model.head_dim, name) for name in dict.fromkeys(names)]
    exact = next((spec for spec in specs if spec.is_exact), specs[0].of_format(OWN_FORMAT))
    sealed = [spec for spec in specs if not spec.is_exact]
    _check(exact, sealed)
    setup = set_up(sealed) if sealed else SealedSetup.unchecked(())
    return [setup.specs.get(spec.format, spec) for spec in specs], setup


def _check(exact: KVSpec, sealed: Sequence[KVSpec]) -> None:
    if sealed and exact.format != OWN_FORMAT:
        raise ConfigError(f"KV format {exact.format} cannot be served beside {sealed[0].format}; {OWN_FORMAT} can.")
    for spec in sealed:
        if any(is_rotated(name) for name in parse_format(spec.format).names) and spec.head_dim & (spec.head_dim - 1):
            raise ConfigError(
                f"KV format {spec.format} rotates heads of a power of two channels, and this model's have "
                f"{spec.head_dim}; uniform4 does not."
            )


def _num_pages(spec: KVSpec, budget: int, config: EngineConfig, num_seqs: int, max_model_len: int) -> int:
    """Pages that fit the budget, no more than all sequences at full length could fill; at least one full sequence."""
    one_sequence = spec.pages_for(max_model_len)
    pages = min(budget // spec.page_bytes, num_seqs * one_sequence)
    if pages < one_sequence and not config.kv_cache_bytes:
        raise AnyBitError(
            f"A context of {max_model_len} tokens needs {one_sequence * spec.page_bytes >> 20} MiB of KV cache in "
            f"{spec.format}, but only {max(budget, 0) >> 20} MiB are free for it; lower --max-model-len."
        )
    return max(1, pages)
