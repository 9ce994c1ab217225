"""The ways of reading a model that an evaluation compares: nested at each width, float, and baselines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anybit.engine.config import ConfigError
from anybit.engine.evaluate.matquant_slice import MatQuantSliceLoader
from anybit.engine.evaluate.options import BASELINES, MATQUANT_SLICE
from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv.cache import OWN_FORMAT
from anybit.engine.kv.sealed_setup import set_up_sealed
from anybit.engine.models.decoder import WeightLoader, build_decoder
from anybit.engine.models.registry import parse_config, read_config
from anybit.engine.weights.accounting import effective_bits, linear_entries
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import DenseLoader, NestedLoader
from anybit.engine.weights.source import SourceModel
from anybit.kvcache.formats import parse_format
from anybit.kvcache.spec import KVSpec


@dataclass(frozen=True, slots=True)
class Comparison:
    """Builds the variants of one checkpoint and its source; `max_positions` is the longest sequence they will see."""

    reader: CheckpointReader
    max_positions: int
    lm_head_bits: int
    kv_formats: Sequence[str]
    device: torch.device

    def nested(self, bit_widths: Sequence[int]) -> list[Variant]:
        """What is served: one decoder read at each width, with the keys and values of each format."""
        loader = NestedLoader(self.reader, bit_widths, self.lm_head_bits, self.device)
        decoder = build_decoder(read_config(self.reader.directory), loader, self.max_positions, device=self.device)
        entries = linear_entries(self.reader.manifest)
        model = decoder.config
        specs = [KVSpec(model.num_layers, model.num_kv_heads, model.head_dim, name) for name in self.kv_formats]
        sealed = [spec for spec in specs if not spec.is_exact]
        setup = None
        if sealed:
            setup = set_up_sealed(self.reader, decoder, max(bit_widths), self.max_positions, sealed)
        return [
            Variant(str(width), decoder, width, name, effective_bits(entries, width), setup=setup)
            for width in bit_widths
            for name in self.kv_formats
        ]

    def unquantized(self, source: SourceModel) -> Variant:
        return self._dense("float", DenseLoader(source, device=self.device), source, 8, 32.0, "float")

    def baseline(self, name: str, source: SourceModel, width: int) -> Variant:
        """ConfigError for a baseline that does not exist."""
        if name != MATQUANT_SLICE:
            raise ConfigError(f"The baseline {name!r} is not one of {', '.join(BASELINES)}.")
        label = self.reader.manifest.group_size
        group_size = None if label == "auto" else int(label)
        dense = DenseLoader(source, device=self.device)
        loader = MatQuantSliceLoader(dense, group_size, width, self.lm_head_bits)
        # A slice reads bit r+1 to round (8 bits have none to read) and one scale and zero per group.
        linears = linear_entries(self.reader.manifest)
        weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
        floats = sum(32 * entry.shape[0] * entry.shape[1] / entry.group_size for entry in linears)
        return self._dense(str(width), loader, source, width, min(width + 1, 8) + floats / weights, name)

    def _dense(
        self, label: str, loader: WeightLoader, source: SourceModel, width: int, bits: float, scheme: str
    ) -> Variant:
        decoder = build_decoder(parse_config(source.config), loader, self.max_positions, device=self.device)
        exact = next((name for name in self.kv_formats if parse_format(name).is_exact), OWN_FORMAT)
        return Variant(label, decoder, width, exact, bits, scheme)
