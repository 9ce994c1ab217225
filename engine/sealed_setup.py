"""How sealed formats are to keep a model's keys and values, found out before pages are counted."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anybit.engine.key_balance import estimate_balance
from anybit.engine.kv_selfcheck import LEAST_TOKENS, check_format
from anybit.engine.models.decoder import Decoder
from anybit.engine.prompt_heads import prompt_tokens, read_heads
from anybit.kvcache.formats import is_rotated, parse_format
from anybit.kvcache.spec import KVSpec

logger = logging.getLogger("anybit.engine")


@dataclass(frozen=True, slots=True)
class SealedSetup:
    """Balance weights of each layer's keys, None where there are none, and by format the spec to serve it by."""

    key_weights: Sequence[Tensor] | None
    specs: Mapping[str, KVSpec]

    @classmethod
    def unchecked(cls, specs: Sequence[KVSpec]) -> "SealedSetup":
        """Without weights, as the specs are."""
        return cls(None, {spec.format: spec for spec in specs})


def set_up_sealed(
    directory: Path, decoder: Decoder, bit_width: int, max_positions: int, specs: Sequence[KVSpec]
) -> SealedSetup:
    """Balance weights for the formats that rotate keys, and the check of all (`kv_selfcheck`), from a page of text.

    Reads the weights at `bit_width`. A context of too few tokens leaves keys unbalanced and formats unchecked.
    """
    token_ids = prompt_tokens(directory, max_positions)
    if len(token_ids) < LEAST_TOKENS:
        logger.warning(
            "Keys are kept without balance weights and KV formats unchecked: there are %d tokens for both.",
            len(token_ids),
        )
        return SealedSetup.unchecked(specs)
    heads = read_heads(decoder, token_ids, bit_width)
    weights = None
    if any(is_rotated(parse_format(spec.format).keys) for spec in specs):
        weights = estimate_balance(heads)
        logger.info("Balance weights of the keys were estimated from %d tokens.", len(token_ids))
    settings = [layer.attention.settings for layer in decoder.layers]
    checks = [check_format(spec, heads, settings, weights, decoder.device) for spec in specs]
    for check in checks:
        check.report()
    return SealedSetup(weights, {check.spec.format: check.spec for check in checks})
