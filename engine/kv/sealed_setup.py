"""How sealed formats are to keep a model's keys and values, found out before pages are counted."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from anybit.engine.kv.key_balance import KeyBalance, load_key_balance
from anybit.engine.kv.prompt_heads import LayerHeads, prompt_tokens, read_heads
from anybit.engine.kv.selfcheck import LEAST_TOKENS, MOST_TOKENS, check_format
from anybit.engine.models.decoder import Decoder
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.kvcache.formats import is_rotated, parse_format
from anybit.kvcache.spec import KVSpec

logger = logging.getLogger("anybit.engine")


@dataclass(frozen=True, slots=True)
class SealedSetup:
    """Balance weights of each layer's keys, None where there are none, and by format the spec to serve it by.

    `doubts` says, by format, what speaks against one that nobody has asked for by name.
    """

    key_weights: Sequence[Tensor] | None
    specs: Mapping[str, KVSpec]
    doubts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def unchecked(cls, specs: Sequence[KVSpec]) -> "SealedSetup":
        """Without weights, as the specs are."""
        return cls(None, {spec.format: spec for spec in specs})


def set_up_sealed(
    reader: CheckpointReader, decoder: Decoder, bit_width: int, max_positions: int, specs: Sequence[KVSpec]
) -> SealedSetup:
    """Balance weights for the formats that rotate keys, the checkpoint's or from a page of text, and the check of all
    formats with that text (`selfcheck`).

    Reads the weights at `bit_width`. A context of too few tokens leaves formats unchecked. CheckpointError if the
    checkpoint's balance weights cannot be read.
    """
    is_balanced = any(is_rotated(parse_format(spec.format).keys) for spec in specs)
    weights = _stored_weights(reader, decoder) if is_balanced else None
    lacks_weights = is_balanced and weights is None
    token_ids = prompt_tokens(reader.directory, max_positions)
    if len(token_ids) < LEAST_TOKENS:
        logger.warning(
            "KV formats are unchecked%s: there are %d tokens for that.",
            ", and keys without balance weights" if lacks_weights else "",
            len(token_ids),
        )
        doubt = "there are too few tokens to check it with."
        return SealedSetup(
            weights, {spec.format: spec for spec in specs}, dict.fromkeys((spec.format for spec in specs), doubt)
        )
    heads = read_heads(decoder, token_ids if lacks_weights else token_ids[:MOST_TOKENS], bit_width)
    if lacks_weights:
        weights = _estimated_weights(heads)
    settings = [layer.attention.settings for layer in decoder.layers]
    checks = [check_format(spec, heads, settings, weights, decoder.device) for spec in specs]
    for check in checks:
        check.report()
    doubts = {check.spec.format: check.doubt for check in checks}
    return SealedSetup(
        weights,
        {check.spec.format: check.spec for check in checks},
        {name: doubt for name, doubt in doubts.items() if doubt is not None},
    )


def _stored_weights(reader: CheckpointReader, decoder: Decoder) -> list[Tensor] | None:
    entry = reader.manifest.key_balance
    if entry is None:
        return None
    weights = load_key_balance(reader.directory, decoder.config)
    logger.info(
        "Balance weights of the keys are the checkpoint's, from %d tokens of %s.",
        entry.tokens,
        " and ".join(entry.texts),
    )
    return weights


def _estimated_weights(heads: Sequence[LayerHeads]) -> list[Tensor]:
    balance = KeyBalance()
    balance.add(heads)
    logger.info("Balance weights of the keys were estimated from %d tokens.", heads[0].num_tokens)
    return balance.weights()
