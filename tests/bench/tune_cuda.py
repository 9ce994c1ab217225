"""Finds the fastest tilings of the GPU's products on this machine, and writes them to kernels/cuda/tuned.json.

    python tests/bench/tune_cuda.py [--shapes 4096x4096,28672x4096] [--bit-width 2,4] [--token-tiles 1,2] [--json OUT]

All candidates are compiled first, on all cores; then each is timed in a CUDA graph, weights rotating past the L2 cache.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from anybit.engine.bench.graph_timing import graph_seconds
from anybit.engine.bench.random_weight import random_weight
from anybit.engine.bench.shapes import Shape, parse_shapes
from anybit.kernels import layout
from anybit.kernels.cuda import fragments
from anybit.kernels.cuda import linear as cuda
from anybit.kernels.cuda.activations import InputForm, prepare_activations
from anybit.kernels.cuda.compiler import cached_cubin
from anybit.kernels.cuda.driver import architecture
from anybit.kernels.cuda.tuning import Tiling, num_segments
from anybit.kernels.duplicates import duplicates

TUNED = Path(__file__).parents[2] / "kernels" / "cuda" / "tuned.json"
GROUP_SIZE = 128
TOKENS = {1: 1, 2: 8, 4: 16, 8: 64}  # n-tiles of a pass -> tokens; the last makes two passes
ROTATION_BYTES = 150_000_000
MAX_WARPS, MAX_SHARED, REGISTERS = 32, 200 << 10, 1 << 16
MIN_BLOCKS, MAX_BLOCKS, MIN_WARPS = 100, 300, 132 * 6


def candidates(shape: Shape, bit_width: int, token_tiles: int) -> Iterator[Tiling]:
    row_tiles = -(-shape.out_features // fragments.TILE_ROWS)
    segments = num_segments(shape.out_features, shape.in_features)
    # Clusters pay for long passes alone.
    clusters = (1, 2, 4, 8) if token_tiles > 4 else (1,)
    options = itertools.product((1, 2), (1, 2, 3, 4, 6, 7, 14), (1, 2, 4, 8, 16), clusters, (1, 2, 3))
    for tiles, warps, columns, cluster, depth in options:
        tiling = Tiling(tiles, warps, columns, cluster, depth, segments)
        if segments % (columns * cluster) or not 4 <= warps * columns <= MAX_WARPS:
            continue
        blocks = -(-row_tiles // (tiles * warps)) * cluster
        if (
            not blocks >= MIN_BLOCKS
            or blocks * warps * columns < MIN_WARPS
            or tiling.shared_bytes(token_tiles) > MAX_SHARED
        ):
            continue
        if blocks > MAX_BLOCKS and cluster > 1:  # smaller clusters would do
            continue
        registers = tiles * token_tiles * (10 if bit_width > 4 else 6) + depth * tiles * (bit_width + 4) + 30
        if registers > 255 or registers * tiling.threads > REGISTERS:
            continue
        yield tiling
        if tiling.threads == 256 and token_tiles <= 4:
            yield replace(tiling, min_blocks=3 if token_tiles == 1 else 2)


def integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def compile_one(constants: tuple[str, dict[str, int]]) -> None:
    architecture, defines = constants
    cached_cubin("linear_decode", architecture, defines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3-8b")
    parser.add_argument("--bit-width", type=integers, default=layout.BIT_WIDTHS)
    parser.add_argument("--token-tiles", type=integers, default=tuple(TOKENS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes = parse_shapes(arguments.shapes)
    cells = [
        (shape, width, tiles) for shape in shapes for width in arguments.bit_width for tiles in arguments.token_tiles
    ]
    target = architecture(torch.cuda.get_device_capability())
    jobs = [
        (target, cuda.product_constants(tiling, width, GROUP_SIZE, torch.float16, torch.bfloat16, tiles))
        for shape, width, tiles in cells
        for tiling in candidates(shape, width, tiles)
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(compile_one, jobs, chunksize=4))
    print(f"{len(jobs)} candidates compiled", flush=True)
    measured: dict[str, list[tuple[float, dict[str, int]]]] = {}
    for shape, width, token_tiles in cells:
        measured[f"{shape}/{width}/{token_tiles}"] = timed(shape, width, token_tiles)
        seconds, best = measured[f"{shape}/{width}/{token_tiles}"][0]
        print(f"{shape} {width} bits, {TOKENS[token_tiles]:2d} tokens: {seconds * 1e6:6.2f} us {best}", flush=True)
    device = torch.cuda.get_device_name()
    table = json.loads(TUNED.read_text())
    table.setdefault(device, {}).update({key: rows[0][1] for key, rows in measured.items()})
    TUNED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if arguments.json is not None:
        cells = {key: {"microseconds": rows[0][0] * 1e6, **rows[0][1]} for key, rows in measured.items()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        report: dict[str, Any] = {"device": device, "versions": versions, "group_size": GROUP_SIZE}
        known = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"cells": {}}
        report["cells"] = {**known["cells"], **cells} if known.get("device") == device else cells
        arguments.json.write_text(json.dumps(report, indent=1))


def timed(shape: Shape, bit_width: int, token_tiles: int) -> list[tuple[float, dict[str, int]]]:
    """Seconds and tiling, the fastest first."""
    weight = random_weight(shape, GROUP_SIZE, (bit_width,), "cuda")
    count = max(2, ROTATION_BYTES // weight.bytes_read(bit_width) + 1)
    copies = duplicates(fragments.pack(weight), count)
    tokens = TOKENS[token_tiles]
    x = torch.randn(tokens, shape.in_features, device="cuda", dtype=torch.bfloat16)
    activations = prepare_activations(x, InputForm(GROUP_SIZE))
    y = torch.empty(tokens, shape.out_features, device="cuda", dtype=torch.bfloat16)
    results = []
    for tiling in candidates(shape, bit_width, token_tiles):
        calls = [
            lambda copy=copy, tiling=tiling: cuda.multiply_few(activations, copy, bit_width, None, y, tiling)
            for copy in copies
        ]
        fields = asdict(tiling)
        del fields["segments"]
        results.append((graph_seconds(calls, 5), fields))
    return sorted(results, key=lambda result: result[0])


if __name__ == "__main__":
    main()
