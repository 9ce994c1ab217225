"""What a measurement of the decode loop needs to know of the model it measures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from anybit.engine.assemble import assemble
from anybit.engine.config import EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.machine import resolve_device


@dataclass(frozen=True, slots=True)
class DecodeSubject:
    """A core that is ready to step; `weight_bytes` by width are those that a step reads."""

    core: EngineCore
    max_model_len: int
    name: str
    device: torch.device
    device_name: str
    vocab_size: int
    kv_format: str
    kv_bytes_per_token: float
    weight_bytes: Mapping[int, int]


def loaded_subject(config: EngineConfig) -> DecodeSubject:
    """The checkpoint that a configuration names."""
    core, info = assemble(config)
    return DecodeSubject(
        core=core,
        max_model_len=info.max_model_len,
        name=info.name,
        device=resolve_device(config.device),
        device_name=info.device,
        vocab_size=info.vocab_size,
        kv_format=info.kv_format,
        kv_bytes_per_token=info.kv_formats[0].bytes_per_token,
        weight_bytes={entry.bit_width: entry.bytes_read_per_token for entry in info.widths},
    )
