"""Times GemLite's products beside which `anybit bench kernels --device cuda` is read; needs a GPU and the package gemlite.

    python tests/bench/gemlite_peer.py --shape 4096x4096,28672x4096,4096x14336 --batch 1,8,16,64 --json OUT

Weights of 2, 4 and 8 bits in groups of 128, bfloat16 inputs, the package's own choice of kernel for this GPU. Weights rotate
past the caches and calls run in a CUDA graph, as in that command; rows have its form.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from gemlite.helper import A16Wn
from torch import Tensor

from anybit.engine.bench.graph_timing import graph_seconds
from anybit.engine.bench.shapes import Shape, parse_shapes
from anybit.engine.machine import describe_device

GROUP_SIZE = 128
BIT_WIDTHS = (2, 4, 8)
ROTATION_BYTES = 256 << 20
_MAX_COPIES = 32
_REPLAYS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--batch", default="1,8,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batch.split(",")]
    rows: list[dict[str, Any]] = []
    for shape in parse_shapes(arguments.shape):
        for bit_width in BIT_WIDTHS:
            rows += measure(shape, bit_width, batches, arguments.rounds)
            print(*(f"{shape} {row['bit_width']} bits, {row['m']}: {row['microseconds']:.1f}" for row in rows[-4:]))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report = {"device": describe_device(torch.device("cuda")), "versions": versions, "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(shape: Shape, bit_width: int, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    num_bytes = shape.out_features * shape.in_features * bit_width // 8
    layers = [random_layer(shape, bit_width) for _ in range(min(_MAX_COPIES, ROTATION_BYTES // num_bytes + 1))]
    rows = []
    for batch in batches:
        x = torch.randn(batch, shape.in_features, device="cuda").bfloat16()
        calls = [lambda layer=layer, x=x: layer(x) for layer in layers]
        seconds = statistics.median(graph_seconds(calls, _REPLAYS) for _ in range(rounds))
        rows.append(
            {
                "op": "linear",
                "out": shape.out_features,
                "in": shape.in_features,
                "m": batch,
                "bit_width": bit_width,
                "group_size": GROUP_SIZE,
                "peer": "gemlite",
                "microseconds": seconds * 1e6,
                "bytes": num_bytes,
            }
        )
    return rows


def random_layer(shape: Shape, bit_width: int) -> torch.nn.Module:
    codes = torch.randint(1 << bit_width, (shape.out_features, shape.in_features), dtype=torch.uint8, device="cuda")
    groups = shape.out_features * shape.in_features // GROUP_SIZE
    step = (12 / shape.in_features) ** 0.5 / (1 << bit_width)

    def parts(value: float) -> Tensor:
        return torch.full((groups, 1), value, device="cuda").bfloat16()

    layer: torch.nn.Module = A16Wn(device="cuda:0", dtype=torch.bfloat16).from_weights(
        codes, parts(step), parts(((1 << bit_width) - 1) / 2), bit_width, GROUP_SIZE
    )
    return layer


if __name__ == "__main__":
    main()
