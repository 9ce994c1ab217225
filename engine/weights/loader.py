"""Gives a decoder its weights: nested from a checkpoint to serve, float from a source model as the reference."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anybit.engine.layers.embedding import DenseVocabulary, NestedVocabulary
from anybit.engine.layers.linear import DenseLinear, NestedLinear
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.source import SourceModel
from anybit.kernels import dispatch
from anybit.kernels.dispatch import ServedWeight


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """Weights of these names, stacked along the output, as they are served at `bit_widths`."""

    names: tuple[str, ...]
    bit_widths: tuple[int, ...]
    weight: ServedWeight


class NestedLoader:
    """Copies each wanted stream straight from the mapped file and gives it the order that the kernels here read.

    Peak memory is one copy and one layer. Only chunks up to the largest width wanted are read; embedding and head keep
    those of `lm_head_bits`. `native` False keeps the portable order. `loaded` lists what was handed out.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        bit_widths: Sequence[int],
        lm_head_bits: int,
        device: torch.device | str = "cpu",
        native: bool = True,
    ) -> None:
        self._native = native
        self._reader = reader
        self._bit_widths = tuple(bit_widths)
        self._lm_head_bits = lm_head_bits
        self._device = device
        self.resident_bytes: Counter[str] = Counter()
        self.loaded: list[LoadedWeight] = []

    def linear(self, prefixes: Sequence[str], bias: bool) -> NestedLinear:
        weight = self._load([f"{prefix}.weight" for prefix in prefixes], self._bit_widths)
        self.resident_bytes["linear"] += weight.nbytes
        biases = torch.cat([self.vector(f"{prefix}.bias") for prefix in prefixes]) if bias else None
        return NestedLinear(weight, biases)

    def vocabulary(self, prefix: str) -> NestedVocabulary:
        weight = self._load([f"{prefix}.weight"], (self._lm_head_bits,))
        self.resident_bytes["embedding"] += weight.nbytes
        return NestedVocabulary(weight, self._lm_head_bits)

    def vector(self, name: str) -> Tensor:
        vector = self._reader.dense(name).to(self._device, torch.float32, copy=True)
        self.resident_bytes["norm"] += vector.nbytes
        return vector

    def _load(self, names: Sequence[str], bit_widths: tuple[int, ...]) -> ServedWeight:
        weight = self.read(names, bit_widths)
        self.loaded.append(LoadedWeight(tuple(names), bit_widths, weight))
        return weight

    def read(self, names: Sequence[str], bit_widths: Sequence[int]) -> ServedWeight:
        """Weights that share an input, stacked along the output, without an entry in the books."""
        weight = self._reader.allocate(names, bit_widths, self._device)
        start = 0
        for name in names:
            stop = start + self._reader.entry(name).shape[0]
            self._reader.copy_nested(name, weight.rows(start, stop))
            start = stop
        return dispatch.prepare(weight) if self._native else weight


class DenseLoader:
    """Weights as floats, straight from a source model; the float reference of an evaluation."""

    def __init__(
        self, source: SourceModel, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._device = device

    def linear(self, prefixes: Sequence[str], bias: bool) -> DenseLinear:
        weight = torch.cat([self.matrix(f"{prefix}.weight") for prefix in prefixes])
        biases = torch.cat([self.vector(f"{prefix}.bias") for prefix in prefixes]) if bias else None
        return DenseLinear(weight, biases)

    def vocabulary(self, prefix: str) -> DenseVocabulary:
        return DenseVocabulary(self.matrix(f"{prefix}.weight"))

    def vector(self, name: str) -> Tensor:
        return self._source.tensor(name).to(self._device, torch.float32)

    def matrix(self, name: str) -> Tensor:
        return self._source.tensor(name).to(self._device, self._dtype)
