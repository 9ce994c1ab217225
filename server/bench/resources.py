"""What a server of this project says that its widths cost: memory, bytes read, live quality."""

from typing import Any, TypeVar

import httpx

from anybit.server.bench.target import Target
from anybit.server.metrics.scrape import Scrape

_TIMEOUT_SECONDS = 30.0

Label = TypeVar("Label", int, str)


async def server_resources(http: httpx.AsyncClient, base_url: str, target: Target) -> dict[str, Any] | None:
    """Bytes by width, kind and KV format, from /metrics and the list of models; None for a server that tells neither."""
    try:
        response = await http.get(f"{base_url.removesuffix('/v1')}/metrics", timeout=_TIMEOUT_SECONDS)
        scrape = Scrape(response.text if response.status_code == 200 else "")
    except (httpx.HTTPError, ValueError):
        return None
    return None if scrape.is_empty else _resources(scrape, target)


def _resources(scrape: Scrape, target: Target) -> dict[str, Any]:
    alone = _whole(scrape.by_width("weights_equivalent_bytes"))
    kv_tokens = _whole(scrape.by_label("kv_capacity_tokens", "kv_format"))
    return {
        "weights_bytes": _whole(scrape.by_label("weights_bytes", "kind")),
        "device_memory_bytes": _whole(scrape.by_label("device_memory_bytes", "kind")),
        "widths": [
            {
                "bit_width": width,
                "effective_bits": target.effective_bits.get(width),
                "equivalent_bytes": alone.get(width),
                "bytes_read_per_token": target.bytes_read_per_token.get(width),
            }
            for width in sorted({*alone, *target.bytes_read_per_token})
        ],
        "kv_formats": [
            {"kv_format": name, "bytes_per_token": size, "capacity_tokens": kv_tokens.get(name)}
            for name, size in scrape.by_label("kv_bytes_per_token", "kv_format").items()
        ],
        "live_quality": _live_quality(scrape),
    }


def _whole(sizes: dict[Label, float]) -> dict[Label, int]:
    return {label: round(size) for label, size in sizes.items()}


def _live_quality(scrape: Scrape) -> list[dict[str, Any]]:
    """Per width, since the server's start, over the tokens of answers that it scored again (`--shadow-rate`)."""
    nats, agreements = (scrape.by_width(f"shadow_{name}_total") for name in ("kl_nats", "top1_agreements"))
    return [
        {
            "bit_width": width,
            "tokens": round(tokens),
            "kl": nats.get(width, 0.0) / tokens,
            "top1_agreement": agreements.get(width, 0.0) / tokens,
        }
        for width, tokens in sorted(scrape.by_width("shadow_tokens_total").items())
        if tokens > 0
    ]
