"""`anybit bench offline`: what whole requests cost without HTTP, to compare a server with."""

import gc
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anybit.engine.config import AUTO_KV_FORMAT, DEFAULT_METHOD, EngineConfig
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    JsonOption,
    LmHeadBitsOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import ensure_prepared, stage_progress
from anybit.server.version import anybit_version


def offline(
    model: ModelArgument = None,
    bit_width: Annotated[str, typer.Option(help="Widths to measure, such as 2,4,8 or all.")] = "4",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at any time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests per width and round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds over the widths, counted together.")] = 1,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests per width that come before and are not counted.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About how long random prompts are.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides the prompts: the same as `anybit bench serve` sends.")] = 0,
    kv_format: Annotated[
        str, typer.Option(metavar="auto|bf16|qet4|...", help="Format of keys and values, as of `anybit serve`.")
    ] = AUTO_KV_FORMAT,
    lm_head_bits: LmHeadBitsOption = 8,
    reproducible: Annotated[
        bool | None,
        typer.Option("--reproducible/--fast", help="As of `anybit serve`; matters on a GPU.", show_default=False),
    ] = None,
    threads: ThreadsOption = 0,
    max_model_len: Annotated[int, typer.Option(min=0, help="Longest prompt + answer; 0 means the model's own.")] = 0,
    max_num_seqs: Annotated[
        int, typer.Option(min=0, help="Sequences computed together; 0 means 16, on a GPU 128.")
    ] = 0,
    device: DeviceOption = "auto",
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    json_path: JsonOption = None,
) -> None:
    """Latency and throughput of the engine alone under the load of `anybit bench serve`, prompts included, per width."""
    bit_widths = parse_bit_widths(bit_width)
    if json_path is not None and not json_path.parent.is_dir():
        raise typer.BadParameter(f"{json_path.parent} is no directory for --json.")
    config = EngineConfig(
        checkpoint="",
        model_name="",
        bit_widths=bit_widths,
        default_bit_width=bit_widths[0],
        lm_head_bits=lm_head_bits,
        kv_format=kv_format,
        device=device,
        threads=threads,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        reproducible=reproducible,
    )
    config.check()
    made_for = parse_bit_widths("all")
    resolved = resolve_model(model, method, parse_group_size(group_size), made_for, source)
    ensure_prepared(resolved, method, group_size, made_for)

    from anybit.engine.bench.offline import keep_in_flight, warm_core  # noqa: PLC0415 - loads torch
    from anybit.server.bench.offline import OfflineSettings, bench_offline  # noqa: PLC0415
    from anybit.server.bench.report import report_table  # noqa: PLC0415
    from anybit.server.bench.workload import Workload  # noqa: PLC0415
    from anybit.server.tokenizer import load_tokenizer  # noqa: PLC0415

    settings = OfflineSettings(
        bit_widths, max_tokens, concurrency, requests, rounds, warm_up, Workload(seed, prompt_tokens)
    )
    tokenizer = load_tokenizer(Path(resolved.checkpoint))
    core, info = warm_core(replace(config, checkpoint=str(resolved.checkpoint), model_name=resolved.name))
    gc.freeze()  # as the engine process of a server does
    with stage_progress(refresh_per_second=2) as progress:  # drawing takes time from what is measured
        rows = bench_offline(
            lambda prompts, width, done: keep_in_flight(core, prompts, width, max_tokens, concurrency, done),
            tokenizer,
            settings,
            lambda done, total: progress.update("bench", done, total),
        )
    report = {
        "model": info.name,
        "device": f"{platform.machine()} {info.device}",
        "versions": {"anybit": anybit_version(), "python": platform.python_version()},
        "settings": settings.to_json() | {"kv_format": info.kv_format, "reproducible": info.reproducible},
        "rows": rows,
    }
    Console().print(report_table(report, f"{info.name} without HTTP, times in ms"))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))
