"""Balance weights of a model's keys: estimated from what its attention does with texts, and kept in its checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anybit.engine.errors import CheckpointError
from anybit.engine.kv.prompt_heads import LayerHeads
from anybit.engine.models.config import DecoderConfig
from anybit.kvcache.codec.balance import BalanceMoments

FILE_NAME = "key_balance.safetensors"


class KeyBalance:
    """Takes texts' heads and tells the weights [kv_heads, head_dim] of each layer (`BalanceMoments`).

    They decide how well pages are kept and nothing else, so the model's own reading at any width is good enough.
    """

    def __init__(self) -> None:
        self._layers: list[BalanceMoments] = []

    def add(self, heads: Sequence[LayerHeads]) -> None:
        """A text's, of a page of tokens at least."""
        self._layers = self._layers or [BalanceMoments() for _ in heads]
        for moments, layer in zip(self._layers, heads, strict=True):
            moments.add(layer.queries[None], layer.keys[None])

    def weights(self) -> list[Tensor]:
        return [moments.weights() for moments in self._layers]


def save_key_balance(directory: Path, weights: Sequence[Tensor]) -> Path:
    """Write each layer's weights into a checkpoint's directory; the file, which the manifest must name."""
    path = directory / FILE_NAME
    save_file({_name(layer): weight.contiguous() for layer, weight in enumerate(weights)}, path)
    return path


def load_key_balance(directory: Path, config: DecoderConfig) -> list[Tensor]:
    """CheckpointError unless the file holds positive weights [kv_heads, head_dim] for each of the model's layers."""
    path = directory / FILE_NAME
    try:
        stored = load_file(path)
        weights = [stored[_name(layer)] for layer in range(config.num_layers)]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(
            f"The keys' balance weights in {path} cannot be read; quantize the model again."
        ) from error
    shape = (config.num_kv_heads, config.head_dim)
    if any(weight.shape != shape or not bool((torch.isfinite(weight) & (weight > 0)).all()) for weight in weights):
        raise CheckpointError(f"The keys' balance weights in {path} are not those of this model; quantize it again.")
    return weights


def _name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.key_balance"
