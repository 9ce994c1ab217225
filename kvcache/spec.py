"""What one page of the KV cache holds and what it costs."""

from dataclasses import dataclass, field

import torch

from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.formats import EXACT_FORMATS, SEALED_FORMATS, KVFormat, parse_format

PAGE_SIZE = PAGE_TOKENS  # the unit in which pages are allocated, shared and compressed
KV_FORMATS = (*EXACT_FORMATS, *SEALED_FORMATS)


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape and format of a model's KV cache. `layer_formats` are those of layers that have another one than `format`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    format: str = "bf16"
    layer_formats: dict[int, str] = field(default_factory=dict, hash=False)

    def of_format(self, name: str) -> "KVSpec":
        """The same model's cache in another format, of all layers."""
        return KVSpec(self.num_layers, self.num_kv_heads, self.head_dim, name)

    def kv_format(self, layer: int) -> KVFormat:
        return parse_format(self.layer_formats.get(layer, self.format))

    @property
    def is_exact(self) -> bool:
        """Whether pages stay as they are written; else they are sealed when they are full."""
        return parse_format(self.format).is_exact

    @property
    def dtype(self) -> torch.dtype:
        """Of exact pages."""
        return EXACT_FORMATS[self.format]

    @property
    def page_bytes(self) -> int:
        """Of keys and values of one page over all layers."""
        return sum(
            self.num_kv_heads * sum(self.kv_format(layer).record_bytes(self.head_dim))
            for layer in range(self.num_layers)
        )

    @property
    def bytes_per_token(self) -> float:
        """Bytes of keys and values that one token of a page occupies over all layers."""
        return self.page_bytes / PAGE_SIZE

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens: of sealed formats one more, with the first tokens as they were written."""
        pages = -(-num_tokens // PAGE_SIZE)
        return pages + 1 if pages and not self.is_exact else pages
