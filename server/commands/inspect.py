"""`anybit inspect`: what is inside a checkpoint, and whether it is intact."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from anybit.engine.config import DEFAULT_METHOD, QUICK_METHOD
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    GroupSizeOption,
    JsonOption,
    LmHeadBitsOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import ensure_prepared, find_preparations


def inspect(
    model: ModelArgument = None,
    lm_head_bits: LmHeadBitsOption = 8,
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    json_path: JsonOption = None,
) -> None:
    """Show a checkpoint's method, tensors, effective bits and bytes per width, after verifying its hashes.

    While a method is being prepared, by a server or by `anybit quantize`, it also says how far that is.
    """
    size, made_for = parse_group_size(group_size), parse_bit_widths("all")
    resolved = resolve_model(model, method, size, made_for, source)
    preparations = find_preparations(model, size, made_for, source)
    quick = resolve_model(model, QUICK_METHOD, size, made_for, source)
    if method in preparations and quick.is_prepared:
        method, resolved = QUICK_METHOD, quick  # what is served until then
    ensure_prepared(resolved, method, group_size, made_for)

    from anybit.engine.weights.description import describe_checkpoint  # noqa: PLC0415 - loads torch

    report = describe_checkpoint(resolved.checkpoint, lm_head_bits)
    report["preparing"] = [
        {"method": name, "stage": progress.stage, "progress": progress.share} for name, progress in preparations.items()
    ]
    console = Console()
    console.print(
        f"{report['checkpoint']}: {report['source']}, method {report['method']}, group size {report['group_size']}"
    )
    console.print(f"{report['num_files']} files, {report['file_bytes'] / 2**20:.1f} MiB, every hash verified")
    balance = report["key_balance"]
    if balance is not None:
        console.print(
            f"keys balanced on {balance['tokens']} tokens of {' and '.join(balance['texts'])}, for KV formats"
        )
    for name, progress in preparations.items():
        console.print(
            f"{name} is being prepared: {progress.stage} {progress.percent} % ({progress.done} of {progress.total}); "
            f"until it is ready, {QUICK_METHOD} is served."
        )
    console.print(_table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        "bits",
        "effective bits",
        "with embedding and head",
        "MiB read per token",
        "MiB if stored alone",
        "perplexity",
        title=f"{report['num_tensors']} nested weights, {report['resident_bytes'] / 2**20:.1f} MiB resident for all widths",
    )
    for row in report["widths"]:
        table.add_row(
            str(row["bit_width"]),
            f"{row['effective_bits']:.2f}",
            f"{row['effective_bits_with_head']:.2f}",
            f"{row['bytes_read_per_token'] / 2**20:.1f}",
            f"{row['equivalent_bytes'] / 2**20:.1f}",
            "" if row["perplexity"] is None else f"{row['perplexity']:,.2f}",
        )
    return table
