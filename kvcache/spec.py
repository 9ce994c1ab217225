"""What one page of the KV cache holds and what it costs."""

from dataclasses import dataclass

import torch

from anybit.kernels.page_layout import PAGE_TOKENS

PAGE_SIZE = PAGE_TOKENS  # the unit in which pages are allocated, shared and compressed

_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
KV_FORMATS = tuple(_DTYPES)


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Shape and format of a model's KV cache. `format` is one of KV_FORMATS."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    format: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.format]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return PAGE_SIZE * self.bytes_per_token

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // PAGE_SIZE)
