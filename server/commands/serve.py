"""`anybit serve`: an OpenAI-compatible server over one nested checkpoint."""

import asyncio
import logging
import os
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from anybit.engine.config import AUTO_KV_FORMAT, DEFAULT_METHOD, QUICK_METHOD, EngineConfig
from anybit.engine.logs import LOG_FORMATS, LogSettings, configure_logging
from anybit.engine.types import ModelInfo
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    LmHeadBitsOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import ensure_prepared, quantize_command
from anybit.server.config import ServerConfig
from anybit.server.upgrade import UpgradePlan

logger = logging.getLogger("anybit.server")

API_KEYS_VARIABLE = "ANYBIT_API_KEYS"


def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(envvar="ANYBIT_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="ANYBIT_PORT", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    default_bit_width: Annotated[int, typer.Option(help="Bits for requests that name no width.")] = 4,
    widths: Annotated[str, typer.Option(help="Widths to serve; only their bits are loaded.")] = "2,3,4,6,8",
    kv_format: Annotated[
        str,
        typer.Option(
            metavar="auto|bf16|qet4|...",
            help="KV format of requests that name none; auto is qet4 where it suits model and device, else bf16.",
        ),
    ] = AUTO_KV_FORMAT,
    kv_formats: Annotated[str, typer.Option(help="More formats for requests to name, such as qet4,qet2.")] = "",
    lm_head_bits: LmHeadBitsOption = 8,
    reproducible: Annotated[
        bool | None,
        typer.Option(
            "--reproducible/--fast",
            help="Results that do not depend on the batch, the default; or a GPU computes prompts in bfloat16.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = 0,
    max_model_len: Annotated[int, typer.Option(min=0, help="Longest prompt + answer; 0 means the model's own.")] = 0,
    max_num_seqs: Annotated[
        int, typer.Option(min=0, help="Sequences computed together; 0 means 16, on a GPU 128.")
    ] = 0,
    kv_cache_mib: Annotated[float, typer.Option(min=0, help="Memory for the KV cache; 0 means up to a quarter.")] = 0,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep computed prompts for those that begin alike.")
    ] = True,
    max_queued_requests: Annotated[
        int, typer.Option(min=1, help="Requests that may wait for their first token; more get status 429.")
    ] = 256,
    device: DeviceOption = "auto",
    compute_dtype: Annotated[str, typer.Option(metavar="auto|float32|bfloat16", help="Type of activations.")] = "auto",
    api_key: Annotated[
        list[str] | None, typer.Option(help=f"Key clients must send; repeatable, or {API_KEYS_VARIABLE}.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="ANYBIT_ALLOWED_ORIGINS",
            help="Origin of web pages that may ask, such as https://chat.example.com, or *; repeatable.",
            show_default=False,
        ),
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="Name that clients ask for.", show_default=False)] = None,
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
    wait: Annotated[
        bool,
        typer.Option(
            "--wait/--no-wait",
            help=f"On first use: wait until --method is done, or serve {QUICK_METHOD} (a minute) until then.",
        ),
    ] = False,
    log_level: Annotated[str, typer.Option(metavar="DEBUG|INFO|WARNING", help="How much to log.")] = "INFO",
    shadow_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers to score again at the highest width, for /metrics.")
    ] = 0,
    otlp_endpoint: Annotated[
        str,
        typer.Option(envvar="OTEL_EXPORTER_OTLP_ENDPOINT", help="Send traces to this OpenTelemetry collector (HTTP)."),
    ] = "",
    log_format: Annotated[
        str, typer.Option(metavar="text|json", help="Log lines for people, or one JSON object per line.")
    ] = "text",
) -> None:
    """Serve a model at any bit-width. Without MODEL: the demo model, downloaded and quantized on first use.

    A method that takes long is at work in the background on first use: round-to-nearest answers until it is done, then
    the better weights take over while requests go on.
    """
    bit_widths = parse_bit_widths(widths)
    if log_level.upper() not in ("DEBUG", "INFO", "WARNING"):
        raise typer.BadParameter(f"{log_level!r} is not one of DEBUG, INFO, WARNING.")
    if log_format not in LOG_FORMATS:
        raise typer.BadParameter(f"{log_format!r} is not one of {', '.join(LOG_FORMATS)}.")
    engine_config = EngineConfig(
        checkpoint="",
        model_name="",
        bit_widths=bit_widths,
        default_bit_width=default_bit_width,
        lm_head_bits=lm_head_bits,
        kv_format=kv_format,
        kv_formats=tuple(part.strip() for part in kv_formats.split(",") if part.strip()),
        compute_dtype=compute_dtype,
        device=device,
        threads=threads,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=int(kv_cache_mib * 2**20),
        prefix_cache=prefix_cache,
        reproducible=reproducible,
    )
    engine_config.check()  # before minutes of quantization, not after
    size, made_for = parse_group_size(group_size), parse_bit_widths("all")
    resolved = resolve_model(model, method, size, made_for, source)
    plan = None
    if not (resolved.is_prepared or wait or method == QUICK_METHOD):
        plan = UpgradePlan(method, resolved, quantize_command(resolved, method, group_size, made_for))
        method, resolved = QUICK_METHOD, resolve_model(model, QUICK_METHOD, size, made_for, source)
    keys = tuple(api_key or [key for key in os.environ.get(API_KEYS_VARIABLE, "").split(",") if key])
    server_config = ServerConfig(
        model_name or resolved.name,
        resolved.checkpoint,
        host,
        port,
        keys,
        max_queued_requests=max_queued_requests,
        shadow_rate=shadow_rate,
        otlp_endpoint=otlp_endpoint,
        allowed_origins=tuple(allowed_origin or ()),
    )
    ensure_prepared(resolved, method, group_size, made_for)
    engine_config = replace(
        engine_config, checkpoint=resolved.checkpoint.as_posix(), model_name=server_config.model_name
    )
    _run(engine_config, server_config, LogSettings(log_level.upper(), log_format), plan)


def _run(engine_config: EngineConfig, server_config: ServerConfig, logs: LogSettings, plan: UpgradePlan | None) -> None:
    # The web stack takes a third of a second to import: not for --help, not before a sentence about a wrong option.
    from anybit.server.launch import run_server  # noqa: PLC0415

    configure_logging(logs)
    announce = _announce if logs.format == "text" else _log_start
    asyncio.run(run_server(engine_config, server_config, logs, announce, plan))


def _log_start(model: ModelInfo, url: str) -> None:
    """What `_announce` tells people, where every line must be one object."""
    fields = {
        "model": model.name,
        "url": url,
        "bit_widths": model.bit_widths,
        "default_bit_width": model.default_bit_width,
        "kv_capacity_tokens": {kv.name: kv.capacity_tokens for kv in model.kv_formats},
    }
    logger.info("%s is served on %s", model.name, url, extra=fields)


def _announce(model: ModelInfo, url: str) -> None:
    widths = ", ".join(map(str, model.bit_widths))
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]{model.name}[/] at {widths} bits on [bold]{url}[/] (default {model.default_bit_width})")
    for kv in model.kv_formats:
        memory = kv.capacity_tokens * kv.bytes_per_token / 2**20
        console.print(f"Room for the keys and values of {kv.capacity_tokens:,} tokens in {kv.name} ({memory:,.0f} MiB)")
    console.print(
        f"Try: curl {url}/v1/completions -H 'Content-Type: application/json' -H 'X-Bit-Width: 4' "
        """-d '{"prompt": "The capital of France is", "max_tokens": 16}'""",
        soft_wrap=True,
    )
