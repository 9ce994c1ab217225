"""What is read from another server's /metrics, and what is made of it."""

import asyncio

import httpx
import pytest

from anybit.server.bench.resources import server_resources
from anybit.server.bench.target import Target
from anybit.server.metrics.scrape import Scrape

TEXT = """\
# HELP anybit_shadow_tokens_total Tokens.
# TYPE anybit_shadow_tokens_total counter
anybit_shadow_tokens_total{model="m",bit_width="2"} 40
anybit_shadow_tokens_total{model="m",bit_width="4"} 0
anybit_shadow_kl_nats_total{model="m",bit_width="2"} 10
anybit_shadow_top1_agreements_total{model="m",bit_width="2"} 30
anybit_weights_bytes{model="m",kind="linear"} 5
anybit_weights_bytes{model="n",kind="linear"} 7
anybit_requests_running{model="m",bit_width="at-least-4"} 3
anybit_requests_running{model="m",bit_width="4"} 1
anybit_kv_cache_usage_ratio{kv_format="bf16"} NaN
process_cpu_seconds_total 12
"""


def resources(status: int, text: str) -> dict | None:
    async def ask() -> dict | None:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
        async with httpx.AsyncClient(transport=transport) as http:
            return await server_resources(http, "http://host/v1", Target("m", [2, 4], None))

    return asyncio.run(ask())


def test_series_are_summed_by_a_label():
    scrape = Scrape(TEXT)
    assert scrape.by_label("weights_bytes", "kind") == {"linear": 12}
    assert scrape.by_width("requests_running") == {4: 1}
    assert scrape.by_label("kv_cache_usage_ratio", "kv_format") == {}  # JSON has no NaN
    assert scrape.by_label("missing", "kind") == {}


def test_live_quality_is_a_mean_over_what_was_scored():
    found = resources(200, TEXT)
    assert found is not None
    assert found["live_quality"] == [{"bit_width": 2, "tokens": 40, "kl": 0.25, "top1_agreement": 0.75}]
    assert found["widths"] == []


@pytest.mark.parametrize(
    ("status", "text"),
    [(404, TEXT), (200, ""), (200, "process_cpu_seconds_total 12\n"), (200, "<html>{no metrics"), (200, "a b c d e")],
)
def test_other_servers_tell_nothing(status, text):
    assert resources(status, text) is None
