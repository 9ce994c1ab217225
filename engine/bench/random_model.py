"""Models of well-known shapes with random weights: speed needs no download."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.engine.bench.model_shapes import MODELS
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape
from anybit.engine.bench.subject import DecodeSubject
from anybit.engine.config import EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.kv.cache import build_cache
from anybit.engine.kv.sealed_setup import SealedSetup
from anybit.engine.layers.embedding import DenseVocabulary, NestedVocabulary, VocabularyTable
from anybit.engine.layers.linear import DenseLinear, Linear, NestedLinear
from anybit.engine.machine import describe_device, keep_freed_memory, physical_cores, resolve_device, use_threads
from anybit.engine.models.config import DecoderConfig
from anybit.engine.models.decoder import build_decoder
from anybit.engine.runner import Runner
from anybit.engine.scheduler import Scheduler, SchedulerConfig
from anybit.engine.weight_traffic import WeightTraffic
from anybit.kernels import dispatch, layout

_GROUP_SIZE = 128
UNQUANTIZED = 16
"""The width that stands for bfloat16 weights in reports."""


class RandomLoader:
    """Gives a decoder random weights that keep activations near 1, and counts what a pass reads.

    Nested ones, at `bit_widths`; where these are UNQUANTIZED alone, bfloat16.
    """

    def __init__(
        self, config: DecoderConfig, bit_widths: Sequence[int], lm_head_bits: int, device: torch.device
    ) -> None:
        self._columns = {
            "o_proj": config.num_heads * config.head_dim,
            "down_proj": config.intermediate_size,
        }
        self._config = config
        self._bit_widths = tuple(bit_widths)
        self._is_dense = self._bit_widths == (UNQUANTIZED,)
        self._lm_head_bits = lm_head_bits
        self._device = device
        self.linear_bytes: Counter[int] = Counter()
        self.part_bytes: Counter[int] = Counter()
        self.head_bytes = 0

    def linear(self, prefixes: Sequence[str], bias: bool) -> Linear:
        names = [prefix.rsplit(".", 1)[-1] for prefix in prefixes]
        rows = sum(self._config.outputs_of(name) for name in names)
        shape = Shape(rows, self._columns.get(names[0], self._config.hidden_size))
        biases = torch.zeros(rows, device=self._device) if bias else None
        if self._is_dense:
            matrix = self._matrix(shape)
            self.linear_bytes[UNQUANTIZED] += matrix.nbytes
            return DenseLinear(matrix, None if biases is None else biases.to(matrix.dtype))
        weight = random_weight(shape, _GROUP_SIZE, self._bit_widths, self._device)
        for width in self._bit_widths:
            self.linear_bytes[width] += weight.bytes_read(width)
            self.part_bytes[width] += weight.bytes_read(width) - layout.code_bytes(
                shape.out_features, shape.in_features, width
            )
        return NestedLinear(dispatch.prepare(weight), biases)

    def vocabulary(self, prefix: str) -> VocabularyTable:
        del prefix
        shape = Shape(self._config.vocab_size, self._config.hidden_size)
        if self._is_dense:
            matrix = self._matrix(shape)
            self.head_bytes = matrix.nbytes
            return DenseVocabulary(matrix)
        weight = random_weight(shape, _GROUP_SIZE, (self._lm_head_bits,), self._device)
        self.head_bytes = weight.bytes_read(self._lm_head_bits)
        return NestedVocabulary(dispatch.prepare(weight), self._lm_head_bits)

    def vector(self, name: str) -> Tensor:
        size = self._config.head_dim if name.endswith(("q_norm.weight", "k_norm.weight")) else self._config.hidden_size
        return torch.ones(size, device=self._device)

    def _matrix(self, shape: Shape) -> Tensor:
        matrix = torch.randn(shape.out_features, shape.in_features, dtype=torch.bfloat16, device=self._device)
        return matrix.mul_(shape.in_features**-0.5)


def random_subject(shape: str, config: EngineConfig, context: int) -> DecodeSubject:
    """A core of that shape with random weights, with room for `max_num_seqs` sequences of `context` tokens each.

    Of `bit_widths`, UNQUANTIZED can only be asked for alone, and only for a GPU is it more than a slow reference.
    """
    keep_freed_memory()
    device = resolve_device(config.device)
    use_threads(config.threads or physical_cores(), device)
    model = MODELS[shape]
    bit_widths = config.bit_widths or layout.BIT_WIDTHS
    loader = RandomLoader(model, bit_widths, config.lm_head_bits, device)
    dtype = torch.bfloat16 if device.type == "cuda" or bit_widths == (UNQUANTIZED,) else torch.float32
    decoder = build_decoder(model, loader, context, dtype, device, is_fast=config.reproducible is False)
    num_seqs = config.num_seqs(device.type)
    books, pool = build_cache(
        replace(config, max_num_seqs=num_seqs + 1), decoder, context, device, SealedSetup.unchecked
    )
    core = EngineCore(
        Runner(decoder, pool),
        Scheduler(books, SchedulerConfig(num_seqs, config.step_tokens(device.type), None)),
        context,
        WeightTraffic(loader.linear_bytes, loader.part_bytes, loader.head_bytes),
    )
    return DecodeSubject(
        core=core,
        max_model_len=context,
        name=f"{shape}, random weights",
        device=device,
        device_name=describe_device(device),
        vocab_size=model.vocab_size,
        kv_format=books.default,
        kv_bytes_per_token=books.formats[books.default].spec.bytes_per_token,
        weight_bytes={width: loader.linear_bytes[width] + loader.head_bytes for width in bit_widths},
    )
