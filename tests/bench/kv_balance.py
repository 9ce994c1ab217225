"""KL divergence from bf16 keys and values by where the balance weights of keys come from, and what raised layers are worth.

    python tests/bench/kv_balance.py [MODEL] --text FILE --calibration FILE --json OUT [--kv-format qet4,qet2]

The served kernels, windows and text of `anybit bench kv`, with weights as `anybit serve` estimates them at the start, as
`anybit quantize --kv-calibration FILE` keeps them, and with none. Where the start-up self-check raises layers to uniform8
(`raised`), the same is measured with these layers left in the format too.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from kv_reference import Reference, add_options
from torch import Tensor

from anybit.engine.evaluate.variant import Variant
from anybit.engine.kv import prompt_heads
from anybit.engine.kv.key_balance import KeyBalance
from anybit.engine.kv.prompt_heads import prompt_tokens, read_heads
from anybit.engine.kv.sealed_setup import SealedSetup
from anybit.engine.kv.selfcheck import MOST_TOKENS, check_format
from anybit.engine.models.decoder import Decoder
from anybit.engine.quantize.kv_calibration import key_windows
from anybit.kvcache.spec import KVSpec


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant, where its balance weights come from and which layers are raised in it."""

    balance: str
    raised: tuple[int, ...]
    variant: Variant


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--kv-format", default="qet4,qet2")
    arguments = parser.parse_args()
    if arguments.context < prompt_heads.MOST_TOKENS:
        parser.error(f"--context is at least {prompt_heads.MOST_TOKENS}, as many tokens as weights are estimated from.")
    reference = Reference.open(arguments)
    directory, variant = reference.reader.directory, reference.variant
    weights = weights_by_source(directory, arguments.calibration, variant)
    measured = [
        found for name in arguments.kv_format.split(",") for found in measured_ways(directory, variant, name, weights)
    ]
    reference.score([found.variant for found in measured])
    report = {
        **reference.about(),
        "calibration": arguments.calibration.name,
        "rows": [
            {
                "kv_format": found.variant.kv_format,
                "balance": found.balance,
                "raised": found.raised,
                "perplexity": found.variant.perplexity,
                "kl": found.variant.kl / found.variant.tokens,
                "top1_agreement": found.variant.agreements / found.variant.tokens,
            }
            for found in measured
        ],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def weights_by_source(directory: Path, calibration: Path, reference: Variant) -> dict[str, Sequence[Tensor] | None]:
    """Balance weights of each layer's keys, by what they come from."""
    decoder, width = reference.decoder, reference.bit_width
    at_start = prompt_tokens(directory, decoder.config.max_position_embeddings)
    calibrated = key_windows(directory, (str(calibration),), seed=0)
    return {
        f"{len(at_start)} tokens at the start": estimated(decoder, [at_start], width),
        f"{sum(map(len, calibrated))} tokens of a calibration": estimated(decoder, calibrated, width),
        "nothing": None,
    }


def estimated(decoder: Decoder, texts: Sequence[Sequence[int]], bit_width: int) -> list[Tensor]:
    balance = KeyBalance()
    for token_ids in texts:
        balance.add(read_heads(decoder, token_ids, bit_width))
    return balance.weights()


def measured_ways(
    directory: Path, reference: Variant, name: str, weights: dict[str, Sequence[Tensor] | None]
) -> Iterator[Measured]:
    decoder = reference.decoder
    config = decoder.config
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, name)
    tokens = prompt_tokens(directory, config.max_position_embeddings)[:MOST_TOKENS]
    heads = read_heads(decoder, tokens, reference.bit_width)
    settings = [layer.attention.settings for layer in decoder.layers]
    for source, of_layers in weights.items():
        checked = check_format(spec, heads, settings, of_layers, decoder.device).spec
        for way in (checked, spec) if checked.layer_formats else (checked,):
            setup = SealedSetup(of_layers, {name: way})
            variant = Variant(
                reference.label, decoder, reference.bit_width, name, reference.effective_bits, setup=setup
            )
            yield Measured(source, tuple(way.layer_formats), variant)


if __name__ == "__main__":
    main()
