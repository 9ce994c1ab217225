"""Balance weights of a model's keys, estimated from what its attention does with a text."""

from collections.abc import Sequence

from torch import Tensor

from anybit.engine.prompt_heads import LayerHeads
from anybit.kvcache.codec.balance import balance_weights


def estimate_balance(heads: Sequence[LayerHeads]) -> list[Tensor]:
    """Weights [kv_heads, head_dim] of each layer (`balance_weights`) from a page of tokens at least.

    They decide how well pages are kept and nothing else, so the model's own reading at any width is good enough.
    """
    return [balance_weights(layer.queries[None], layer.keys[None]) for layer in heads]
