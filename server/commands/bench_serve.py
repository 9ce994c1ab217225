"""`anybit bench serve`: what a server's users feel, measured through its API."""

import asyncio
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anybit.server.commands.options import JsonOption, parse_api_key, parse_base_url, parse_bit_widths
from anybit.server.commands.preparation import stage_progress

# Beyond this share of one core, chunks may wait for this process instead of the server.
_BUSY_CLIENT_SHARE = 0.8


def serve(
    base_url: Annotated[str, typer.Option(help="Address of the server.")] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None, typer.Option(envvar=["ANYBIT_API_KEY", "OPENAI_API_KEY"], help="Bearer key.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to ask; without it, the server's first.", show_default=False)
    ] = None,
    bit_width: Annotated[
        str, typer.Option(help="Widths to measure, such as 2,4,8 or all; without it, the server's default.")
    ] = "",
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight at any time; 8 when not given.", show_default=False)
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help="Instead: requests per second at random times (Poisson); inf is all at once."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per width and round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds over the widths, counted together.")] = 1,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests per width that are sent before and not counted.")] = 1,
    endpoint: Annotated[str, typer.Option(metavar="completions|chat", help="Which API to use.")] = "completions",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About how long random prompts are.")] = 256,
    shared_prefix_tokens: Annotated[
        int, typer.Option(min=0, help="How much of that is the same in all, to measure prefix caches.")
    ] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Prompts to send instead, one per line.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides prompts and times of arrival.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")] = 600.0,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(min=0, help="Goodput: longest time to first token.", show_default=False)
    ] = None,
    slo_tpot_ms: Annotated[
        float | None, typer.Option(min=0, help="Goodput: longest time per further token.", show_default=False)
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Latency and throughput of a running OpenAI-compatible server, of this project or another, per width."""
    from anybit.server.bench.report import Goal, report_table  # noqa: PLC0415 - httpx, after a quick --help
    from anybit.server.bench.run import BenchSettings, bench_serve  # noqa: PLC0415
    from anybit.server.bench.workload import Workload, read_prompts  # noqa: PLC0415

    if endpoint not in ("completions", "chat"):
        raise typer.BadParameter(f"{endpoint!r} is not one of completions, chat.")
    if bit_width not in ("", "all"):
        parse_bit_widths(bit_width)
    _check_load(concurrency, request_rate)
    if not all(math.isfinite(number) for number in (timeout, slo_ttft_ms or 0, slo_tpot_ms or 0)):
        raise typer.BadParameter("--timeout, --slo-ttft-ms and --slo-tpot-ms are finite numbers.")
    if shared_prefix_tokens > (0 if prompts else prompt_tokens):
        raise typer.BadParameter("--shared-prefix-tokens is a part of --prompt-tokens and not for --prompts.")
    if json_path is not None and not json_path.parent.is_dir():
        raise typer.BadParameter(f"{json_path.parent} is no directory for --json.")
    url = parse_base_url(base_url)
    settings = BenchSettings(
        bit_width=bit_width,
        endpoint="chat" if endpoint == "chat" else "completions",
        max_tokens=max_tokens,
        concurrency=concurrency or 8,
        request_rate=request_rate,
        requests=requests,
        rounds=rounds,
        warm_up=warm_up,
        timeout_seconds=timeout,
        workload=Workload(seed, prompt_tokens, shared_prefix_tokens, read_prompts(prompts) if prompts else ()),
        goal=Goal(slo_ttft_ms, slo_tpot_ms),
    )
    with stage_progress(refresh_per_second=2) as progress:  # drawing takes time from what is measured
        report = asyncio.run(
            bench_serve(
                url, parse_api_key(api_key), model, settings, lambda done, total: progress.update("bench", done, total)
            )
        )
    Console().print(report_table(report, f"{report['model']} at {report['base_url']}, times in ms"))
    _print_notes(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))


def _check_load(concurrency: int | None, request_rate: float | None) -> None:
    if request_rate is None:
        return
    if concurrency is not None:
        raise typer.BadParameter("--concurrency and --request-rate are two ways to send; give one.")
    if math.isnan(request_rate) or request_rate <= 0:
        raise typer.BadParameter("--request-rate must be above 0.")


def _print_notes(report: dict[str, Any]) -> None:
    """What a reader of the table must know to trust it."""
    console = Console(stderr=True, highlight=False, markup=False)
    for row in report["rows"]:
        label = "Default width" if row["bit_width"] is None else f"{row['bit_width']} bits"
        for kind, message in row["messages"].items():
            console.print(f"{label}: {row['failed'][kind]} failed ({kind}): {message}", soft_wrap=True)
    for name in report["settings"]["refused_fields"]:
        console.print(f"The server refused the field {name}; it was left out.", soft_wrap=True)
    busiest = max(row["client_cpu_share"] for row in report["rows"])
    if busiest > _BUSY_CLIENT_SHARE:
        text = f"This client was busy {busiest:.0%} of the time; the numbers may be its own and not the server's."
        console.print(text, soft_wrap=True)
