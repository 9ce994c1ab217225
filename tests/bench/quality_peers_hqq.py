"""The quality of HQQ (the package `hqq`, on the CPU): groups of 64 along the rows, its default optimizer.

    pip install hqq && python tests/bench/quality_peers_hqq.py --text FILE --variant rotated --json quality_peers_cpu.json

Every linear of every block, neither embedding nor head. Effective bits count a float16 scale and zero per group;
`stored_bits` is what the package keeps in memory, which packs 3 bits into 3.2.
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import hqq
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from quality_peers_score import Candidate, add_options, open_variant, prepare, score
from quality_sources import ReplacedSource, linear_names
from torch import Tensor

from anybit.engine.weights.source import SourceModel


def quantized(weight: Tensor, bit_width: int, group_size: int) -> tuple[Tensor, int]:
    """What HQQ makes of a weight, as floats, and the bytes that it keeps."""
    config = BaseQuantizeConfig(nbits=bit_width, group_size=group_size, axis=1)
    layer = HQQLinear.from_weights(weight.float(), None, config, compute_dtype=torch.float16, device="cpu")
    kept = [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
    # Codes and float16 parts as they are kept; only the arithmetic on them is float32.
    floats = Quantizer.dequantize(layer.W_q.data, {**layer.meta, "compute_dtype": torch.float32})
    return floats.float(), sum(part.nbytes for part in kept)


def candidates(source: SourceModel, variant: str, widths: Sequence[int], group_size: int) -> Iterator[Candidate]:
    names = linear_names(source)
    for width in widths:
        started = time.perf_counter()
        made = {name: quantized(source.tensor(name), width, group_size) for name in names}
        minutes = (time.perf_counter() - started) / 60
        weights = {name: floats for name, (floats, _) in made.items()}
        stored = sum(size for _, size in made.values()) * 8 / sum(weight.numel() for weight in weights.values())
        yield Candidate(
            method=f"hqq, groups of {group_size}",
            variant=variant,
            bit_width=width,
            effective_bits=width + 32 / group_size,
            minutes=minutes,
            source=ReplacedSource(source, weights),
            more={"stored_bits": round(stored, 4), "linears": len(names)},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--widths", default="2,3,4,8")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    prepare(options)
    widths = [int(width) for width in options.widths.split(",")]
    made = candidates(open_variant(options), options.variant, widths, options.group_size)
    score(made, options, {"hqq": hqq.__version__})


if __name__ == "__main__":
    main()
