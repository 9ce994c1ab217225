"""QET as published beside product quantization, and beside formats of pages, at equal bits on whole matrices.

    python tests/bench/kv_published_qet.py --text FILE --json OUT [--source demo|DIR|GGUF]

The paper's comparison (arXiv 2407.03637): its share of the error of product quantization with float32 codebooks in as many
bytes, everything counted, for few wide groups of columns and for more. A matrix is a layer's keys after rotation by
position, or its values, all heads side by side, without sequences' first pages. Budgets are the bits of evenly spaced levels
per channel (keys) or token (values) of a page, which are measured on the same rows; so is rotation + Lloyd-Max, keys less
the mean of a page. Errors are over the mean variance of a column.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from kv_inputs import AttentionInputs, add_options, attention_inputs, describe_run, text_windows
from kv_rivals import gaussian_table
from torch import Tensor

from anybit.engine.machine import resolve_device
from anybit.engine.quantize.prepare import fetch_source
from anybit.kernels.page_layout import PAGE_TOKENS
from anybit.kvcache.codec.balance import PageBasis
from anybit.kvcache.codec.pages import PageCodec, PairCodec, UniformCodec, stored_bits
from anybit.kvcache.codec.qet_matrix import QetOptions, compress, product_quantization

BITS = (2, 3, 4, 6, 8)
GROUPS = (4, 8, 32)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--layers", help="by commas", default="4,20")
    parser.add_argument("--rows", type=int, default=1920)
    arguments = parser.parse_args()
    source = fetch_source(arguments.source)
    windows = text_windows(source, arguments.text, arguments, resolve_device(arguments.device))
    swept = {int(layer) for layer in arguments.layers.split(",")}
    rows = [
        {"layer": index, "of": kind, **row}
        for index, layer in enumerate(attention_inputs(source, windows))
        if index in swept
        for kind in ("keys", "values")
        for row in sweep(pages_of(layer, kind, arguments.rows), kind == "keys")
    ]
    report = {**describe_run(source, windows, arguments), "rows": arguments.rows, "sweep": rows}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def pages_of(layer: AttentionInputs, kind: str, num_rows: int) -> Tensor:
    """[kv_heads, pages, 64, head_dim], of all sequences in turn."""
    found: Tensor = getattr(layer, kind)[:, :, PAGE_TOKENS:]
    return found.transpose(0, 1).flatten(1, 2)[:, :num_rows].unflatten(1, (-1, PAGE_TOKENS))


def sweep(pages: Tensor, of_keys: bool) -> Iterator[dict[str, Any]]:
    matrix = pages.flatten(1, 2).transpose(0, 1).flatten(1)
    variance = float(matrix.var(0).mean())
    basis = PageBasis(pages.shape[-1])
    for bits in BITS:
        evenly, budget = paged(pages, UniformCodec(bits, "channel" if of_keys else "token"))
        rotated, _ = paged(basis.values(pages), PairCodec(gaussian_table(1, bits), has_mean=of_keys))
        paged_errors = {"uniform": evenly / variance, "rotation + Lloyd-Max": rotated / variance}
        for groups in GROUPS:
            errors = {
                name: float((found - matrix).square().mean()) / variance
                for name, options in (("qet", QetOptions(groups)), ("pq", product_quantization(groups)))
                if (found := decoded(matrix, budget, options)) is not None
            }
            share = errors["qet"] / errors["pq"] if len(errors) == 2 else None
            yield {"budget": budget, "groups": groups, **errors, "share": share, **paged_errors}


def decoded(matrix: Tensor, budget: float, options: QetOptions) -> Tensor | None:
    """None where the budget holds no codebook beside the swaps."""
    try:
        return compress(matrix, budget, options, torch.Generator().manual_seed(0)).decode()
    except ValueError:
        return None


def paged(pages: Tensor, codec: PageCodec) -> tuple[float, float]:
    """Mean squared error, and bits an element."""
    fields = codec.encode(pages)
    return float((codec.decode(fields) - pages).square().mean()), stored_bits(fields, pages.numel())


if __name__ == "__main__":
    main()
