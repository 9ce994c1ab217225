"""Which KV format a server keeps when nobody names one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from anybit.engine.config import EngineConfig
from anybit.engine.kv.cache import build_cache
from anybit.engine.kv.sealed_setup import SealedSetup
from anybit.engine.models.registry import parse_config
from anybit.kvcache.spec import KVSpec
from tests.fixtures.tiny_llama import tiny_config


@dataclass(frozen=True)
class Layers:
    """All layers in one call, with or without quick attention over pairs."""

    is_quick: bool

    def gains_by_pairs(self) -> bool:
        return self.is_quick


class Decoder:
    def __init__(self, head_dim: int, native: Layers | None) -> None:
        self.config = parse_config(tiny_config(head_dim=head_dim).to_dict())
        self.native = native


def served(decoder: Decoder, doubts: dict[str, str] | None = None, **config: Any) -> tuple[str, list[str]]:
    """The default format and all there are."""

    def set_up(specs: Sequence[KVSpec]) -> SealedSetup:
        return SealedSetup(None, {spec.format: spec for spec in specs}, doubts or {})

    books, _ = build_cache(
        EngineConfig("unused", "tiny", kv_cache_bytes=1 << 24, **config),
        decoder,  # type: ignore[arg-type]
        128,
        torch.device("cpu"),
        set_up,
    )
    return books.default, list(books.formats)


def test_it_is_compressed_where_that_wins() -> None:
    assert served(Decoder(64, Layers(True))) == ("qet4", ["qet4"])
    assert served(Decoder(64, Layers(True)), kv_formats=("bf16", "qet4")) == ("qet4", ["qet4", "bf16"])


@pytest.mark.parametrize(
    ("decoder", "doubts", "reason"),
    [
        (Decoder(16, Layers(True)), {}, "heads of a power of two channels, 64 at least, and this model's have 16"),
        (Decoder(96, Layers(True)), {}, "this model's have 96"),
        (Decoder(64, Layers(False)), {}, "would be slower on this machine"),
        (Decoder(64, None), {}, "would be slower on this machine"),
        (Decoder(64, Layers(True)), {"qet4": "it is not good enough for layer 0 of this model."}, "for layer 0"),
    ],
)
def test_it_is_exact_elsewhere_and_the_log_says_why(
    decoder: Decoder, doubts: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "anybit.engine"):
        assert served(decoder, doubts) == ("bf16", ["bf16"])
    assert reason in caplog.text


def test_what_is_named_is_served_whatever_speaks_against_it() -> None:
    doubts = {"qet4": "it is not good enough for layer 0 of this model."}
    assert served(Decoder(64, Layers(False)), doubts, kv_format="qet4") == ("qet4", ["qet4"])
    assert served(Decoder(64, Layers(True)), doubts, kv_formats=("qet4",)) == ("bf16", ["bf16", "qet4"])
