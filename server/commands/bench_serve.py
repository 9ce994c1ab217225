"""`anybit bench serve`: what a server's users feel, measured through its API."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anybit.engine.errors import AnyBitError
from anybit.server.commands.evaluation_tables import text_table
from anybit.server.commands.options import (
    JsonOption,
    check_output,
    parse_api_key,
    parse_base_url,
    parse_bit_widths,
    parse_numbers,
)
from anybit.server.commands.preparation import stage_progress

if TYPE_CHECKING:
    from anybit.server.bench.load import Load

_QUALITY_TOKENS = 2048
_FEWEST_QUALITY_TOKENS = 16


class OutputError(AnyBitError):
    """A file of the result cannot be written."""


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
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Requests in flight at any time, several such as 1,4,16 to measure each; 8 when not given.",
            show_default=False,
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R...]",
            help="Instead: requests per second at random times (Poisson), such as 0.5,1,2; inf is all at once.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per width, load and round.")] = 32,
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
    slo_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the requests that must meet them for a load to be met.")
    ] = 0.9,
    quality_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Then score so many tokens of the built-in text at each width; without it "
            f"{_QUALITY_TOKENS} for --html and else 0, which is none.",
            show_default=False,
        ),
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Also write a report with plots to this file.", show_default=False)
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Latency and throughput of a running OpenAI-compatible server, of this project or another, per width and load."""
    from anybit.server.bench.notes import notes  # noqa: PLC0415 - httpx, after a quick --help
    from anybit.server.bench.report import Goal, report_table  # noqa: PLC0415
    from anybit.server.bench.run import BenchSettings, bench_serve  # noqa: PLC0415
    from anybit.server.bench.workload import Workload, read_prompts  # noqa: PLC0415

    if endpoint not in ("completions", "chat"):
        raise typer.BadParameter(f"{endpoint!r} is not one of completions, chat.")
    if bit_width not in ("", "all"):
        parse_bit_widths(bit_width)
    loads = _parse_loads(concurrency, request_rate, requests)
    if not all(math.isfinite(number) for number in (timeout, slo_share, slo_ttft_ms or 0, slo_tpot_ms or 0)):
        raise typer.BadParameter("--timeout, --slo-ttft-ms, --slo-tpot-ms and --slo-share are finite numbers.")
    if shared_prefix_tokens > (0 if prompts else prompt_tokens):
        raise typer.BadParameter("--shared-prefix-tokens is a part of --prompt-tokens and not for --prompts.")
    if quality_tokens is None:
        quality_tokens = 0 if html_path is None else _QUALITY_TOKENS
    if 0 < quality_tokens < _FEWEST_QUALITY_TOKENS:
        raise typer.BadParameter(f"--quality-tokens is 0 or at least {_FEWEST_QUALITY_TOKENS}.")
    check_output(json_path, "--json")
    check_output(html_path, "--html")
    if json_path is not None and html_path is not None and json_path.resolve() == html_path.resolve():
        raise typer.BadParameter("--json and --html are two files; give each its own name.")
    url, key = parse_base_url(base_url), parse_api_key(api_key)
    settings = BenchSettings(
        bit_width=bit_width,
        endpoint="chat" if endpoint == "chat" else "completions",
        max_tokens=max_tokens,
        loads=loads,
        requests=requests,
        rounds=rounds,
        warm_up=warm_up,
        timeout_seconds=timeout,
        workload=Workload(seed, prompt_tokens, shared_prefix_tokens, read_prompts(prompts) if prompts else ()),
        goal=Goal(slo_ttft_ms, slo_tpot_ms, slo_share),
    )
    with stage_progress(refresh_per_second=2) as progress:  # drawing takes time from what is measured
        report = asyncio.run(
            bench_serve(url, key, model, settings, lambda done, total: progress.update("bench", done, total))
        )
    Console().print(report_table(report, escape(f"{report['model']} at {report['base_url']}, times in ms")))
    _print_sentences(*notes(report))
    report["quality"] = _score(url, key, report, quality_tokens) if quality_tokens else None
    _write(report, json_path, html_path)


def _parse_loads(concurrency: str | None, request_rate: str | None, requests: int) -> "tuple[Load, ...]":
    from anybit.server.bench.load import Load  # noqa: PLC0415

    if concurrency is not None and request_rate is not None:
        raise typer.BadParameter("--concurrency and --request-rate are two ways to send; give one.")
    if request_rate is not None:
        rates = parse_numbers(request_rate, float)
        if not all(rate > 0 for rate in rates):  # nor is what is no number
            raise typer.BadParameter("--request-rate must be above 0.")
        return tuple(Load("request_rate", rate) for rate in rates)
    users = parse_numbers("8" if concurrency is None else concurrency, int)
    if users[0] < 1:
        raise typer.BadParameter("--concurrency must be at least 1.")
    if len(users) > 1 and users[-1] > requests:
        raise typer.BadParameter(f"--concurrency {users[-1]} needs --requests of at least as many.")
    return tuple(Load("concurrency", number) for number in users)


def _score(base_url: str, api_key: str | None, report: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """The quality of the widths that were measured, which is also printed."""
    from anybit.server.scoring.served_quality import served_quality  # noqa: PLC0415 - httpx

    widths = dict.fromkeys(row["bit_width"] for row in report["rows"])
    asked = "" if None in widths else ",".join(map(str, widths))
    with stage_progress() as progress:
        quality = asyncio.run(served_quality(base_url, api_key, report["model"], asked, num_tokens, progress.update))
    if quality["note"] is None:
        Console().print(text_table({"model": report["model"], **quality}))
    else:
        _print_sentences(f"Quality was not measured: {quality['note']}")
    return quality


def _write(report: dict[str, Any], json_path: Path | None, html_path: Path | None) -> None:
    """Both files if one of them fails too; raises OutputError then."""
    from anybit.server.bench.report_page.page import render_page  # noqa: PLC0415 - jinja2

    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (json_path, lambda: json.dumps(report, indent=1)),
        (html_path, lambda: render_page(report)),
    ]
    problems = []
    for path, render in outputs:
        if path is None:
            continue
        try:
            path.write_text(render(), encoding="utf-8", errors="replace")
        except OSError as error:
            problems.append(f"{path} cannot be written: {error.strerror}")
    if problems:
        raise OutputError(f"{'; '.join(problems)}.")


def _print_sentences(*sentences: str) -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True)
