"""/metrics: text that Prometheus can read, every promised name, values that follow what happened."""

import subprocess
import time
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from anybit.engine.types import EngineStats
from anybit.server.errors import Rejection
from anybit.server.metrics.quality import ShadowOutcome
from anybit.server.metrics.sequences import Outcome
from tests.fixtures.programs import require_program
from tests.server.fake_engine import WIDTHS, FakeEngine

PER_WIDTH = {
    "anybit_requests_running": "gauge",
    "anybit_requests_waiting": "gauge",
    "anybit_weights_equivalent_bytes": "gauge",
    "anybit_weight_bytes_read": "counter",
    "anybit_prompt_tokens": "counter",
    "anybit_generated_tokens": "counter",
    "anybit_requests": "counter",
    "anybit_model_info": "gauge",
    "anybit_time_to_first_token_seconds": "histogram",
    "anybit_inter_token_latency_seconds": "histogram",
    "anybit_request_duration_seconds": "histogram",
    "anybit_request_queue_seconds": "histogram",
    "anybit_request_prefill_seconds": "histogram",
    "anybit_request_decode_seconds": "histogram",
    "anybit_shadow_requests": "counter",
    "anybit_shadow_tokens": "counter",
    "anybit_shadow_kl_nats": "counter",
    "anybit_shadow_top1_agreements": "counter",
}
OTHERS = {
    "anybit_build_info": "gauge",
    "anybit_ready": "gauge",
    "anybit_kv_cache_usage_ratio": "gauge",
    "anybit_kv_cache_bytes": "gauge",
    "anybit_kv_bytes_per_token": "gauge",
    "anybit_kv_capacity_tokens": "gauge",
    "anybit_kv_layers_raised": "gauge",
    "anybit_kv_sealed_pages": "counter",
    "anybit_kv_seal_seconds": "counter",
    "anybit_weights_bytes": "gauge",
    "anybit_engine_last_step_timestamp_seconds": "gauge",
    "anybit_engine_resident_bytes": "gauge",
    "anybit_device_memory_bytes": "gauge",
    "anybit_kernel_fallbacks": "counter",
    "anybit_rejections": "counter",
    "anybit_prefix_cache_queried_tokens": "counter",
    "anybit_prefix_cache_hit_tokens": "counter",
    "anybit_preemptions": "counter",
    "anybit_step_tokens": "histogram",
}


def scrape(server):
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def test_every_promised_metric_is_there_with_its_type_and_labels(start):
    server = start(FakeEngine())
    families = scrape(server)
    for name, kind in {**PER_WIDTH, **OTHERS}.items():
        assert families[name].type == kind, name
        assert families[name].documentation
    for name in PER_WIDTH:
        widths = {sample.labels["bit_width"] for sample in families[name].samples}
        assert widths == set(map(str, WIDTHS)), name
        assert all(sample.labels["model"] == "tiny" for sample in families[name].samples)


def test_nothing_else_is_there_but_the_process(start):
    names = set(scrape(start(FakeEngine())))
    assert names - set(PER_WIDTH) - set(OTHERS) == {name for name in names if name.startswith("process_")}
    assert "process_resident_memory_bytes" in names


def test_histograms_begin_where_low_widths_differ(start):
    families = scrape(start(FakeEngine()))
    edges = {
        float(sample.labels["le"])
        for sample in families["anybit_inter_token_latency_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    near = [edge for edge in sorted(edges) if edge <= 0.05]
    assert near[0] == 0.001
    assert all(above <= 1.51 * edge for edge, above in pairwise(near))


def test_no_created_series(start):
    server = start(FakeEngine())
    server.complete()
    assert "_created" not in server.http.get("/metrics").text


def test_engine_snapshot_is_shown(start):
    engine = FakeEngine()
    server = start(engine)
    engine.snapshot = EngineStats(
        running={2: 3, 4: 1},
        waiting={8: 7},
        kv_pages_total=100,
        kv_pages_used=25,
        kv_bytes_total={"bf16": 6400, "qet4": 1000},
        kv_bytes_used={"bf16": 1600},
        kv_bytes_cached={"qet4": 300},
        sealed_pages={"qet4": 40},
        seal_seconds={"qet4": 0.5},
        steps=12,
        weight_bytes_read={2: 2000, 4: 4000},
        kernel_fallbacks={"linear_decode:odd_shape:really": 5},
        resident_bytes=123456,
        device_memory={"weights": 800, "kv_cache": 50, "workspace": 7},
        device_free_bytes=9000,
    )
    engine.silent_seconds = 2.0
    begun = time.time()
    assert server.metric("anybit_requests_running", bit_width="2") == 3
    assert server.metric("anybit_requests_running", bit_width="3") == 0
    assert server.metric("anybit_requests_waiting", bit_width="8") == 7
    assert server.metric("anybit_kv_cache_usage_ratio", kv_format="bf16") == 0.25
    assert server.metric("anybit_kv_cache_bytes", kv_format="bf16", state="used") == 1600
    assert server.metric("anybit_kv_cache_bytes", kv_format="bf16", state="free") == 4800
    assert server.metric("anybit_kv_cache_bytes", kv_format="qet4", state="cached") == 300
    assert server.metric("anybit_kv_cache_bytes", kv_format="qet4", state="free") == 700
    assert server.metric("anybit_kv_bytes_per_token", kv_format="bf16") == 64
    assert server.metric("anybit_kv_bytes_per_token", kv_format="qet4") == 17.5
    assert server.metric("anybit_kv_capacity_tokens", kv_format="qet4") == 8192
    assert server.metric("anybit_kv_sealed_pages_total", kv_format="qet4") == 40
    assert server.metric("anybit_kv_sealed_pages_total", kv_format="bf16") == 0
    assert server.metric("anybit_kv_seal_seconds_total", kv_format="qet4") == 0.5
    assert server.metric("anybit_kv_layers_raised", kv_format="bf16") == 0
    assert server.metric("anybit_kv_layers_raised", kv_format="qet4") == 2
    assert server.metric("anybit_weight_bytes_read_total", bit_width="4") == 4000
    assert server.metric("anybit_kernel_fallbacks_total", kernel="linear_decode", reason="odd_shape:really") == 5
    assert server.metric("anybit_engine_resident_bytes") == 123456
    assert server.metric("anybit_device_memory_bytes", kind="weights") == 800
    assert server.metric("anybit_device_memory_bytes", kind="workspace") == 7
    assert server.metric("anybit_device_memory_bytes", kind="free") == 9000
    assert server.metric("anybit_weights_bytes", kind="embedding") == 2000
    assert server.metric("anybit_weights_equivalent_bytes", bit_width="3") == 3600
    assert server.metric("anybit_model_info", bit_width="3", effective_bits="3.25", kv_format="bf16") == 1
    first = server.metric("anybit_engine_last_step_timestamp_seconds")
    assert begun - 2.0 <= first <= time.time() - 2.0
    engine.silent_seconds = 0.0
    # No further step, no newer time.
    assert server.metric("anybit_engine_last_step_timestamp_seconds") == first


def test_request_series_follow_the_requests(start):
    server = start(FakeEngine(token_seconds=0.002))
    server.complete(max_tokens=5, bit_width=3)
    server.complete(max_tokens=5, bit_width=3, n=2, stream=True)
    width = {"bit_width": "3"}
    assert server.metric("anybit_prompt_tokens_total", **width) == 6
    assert server.metric("anybit_generated_tokens_total", **width) == 15
    assert server.metric("anybit_requests_total", outcome="length", **width) == 3
    assert server.metric("anybit_time_to_first_token_seconds_count", **width) == 3
    assert server.metric("anybit_inter_token_latency_seconds_count", **width) == 12
    assert server.metric("anybit_inter_token_latency_seconds_sum", **width) > 12 * 0.002
    assert server.metric("anybit_request_duration_seconds_count", **width) == 3
    assert server.metric("anybit_request_decode_seconds_count", **width) == 3
    assert server.metric("anybit_request_queue_seconds_sum", **width) == 0.75
    assert server.metric("anybit_request_prefill_seconds_sum", **width) == 1.5
    assert server.metric("anybit_requests_total", outcome="length", bit_width="4") == 0
    assert server.metric("anybit_step_tokens_count") == 15


def test_tokens_that_come_together_share_their_time(start):
    server = start(FakeEngine(tokens_per_event=5, token_seconds=0.01))
    server.complete(max_tokens=15)
    assert server.metric("anybit_inter_token_latency_seconds_count", bit_width="4") == 10
    between = server.metric("anybit_inter_token_latency_seconds_sum", bit_width="4")
    assert between == pytest.approx(server.metric("anybit_request_decode_seconds_sum", bit_width="4"))


def test_rejections_are_counted_by_reason(start):
    server = start(FakeEngine())
    server.complete(n=10_000)
    server.complete(prompt=[5] * 300)
    server.complete(model="other")
    server.http.post("/v1/completions", content=b"x" * 3_000_000)
    for reason in ("invalid", "too_long", "not_found", "too_large"):
        assert server.metric("anybit_rejections_total", reason=reason) == 1, reason


def test_metrics_while_loading(start):
    server = start(FakeEngine(loading=True), wait=False)
    families = scrape(server)
    assert families["anybit_ready"].samples[0].value == 0
    assert "anybit_model_info" not in families


def test_two_servers_do_not_share_series(start):
    first, second = start(FakeEngine()), start(FakeEngine())
    first.complete()
    assert second.metric("anybit_requests_total", outcome="length", bit_width="4") == 0


def test_prometheus_finds_nothing_to_say_about_the_names(start):
    server = start(FakeEngine())
    server.complete()
    promtool = require_program("promtool", "prometheus")
    text = server.http.get("/metrics").text
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_request_can_make_up_label_values(start):
    server = start(FakeEngine(), shadow_rate=1.0)
    for fields in ({"bit_width": 5}, {"model": "tiny@7bit"}, {"model": "evil"}, {"kv_format": "odd"}, {"user": "me"}):
        server.complete(max_tokens=2, **fields)
    for width in WIDTHS:
        server.complete(max_tokens=2, model=f"tiny@at-least-{width}bit")
    server.http.get("/v1/nothing/here")
    allowed = {
        "model": {"tiny"},
        "bit_width": {f"{prefix}{width}" for width in WIDTHS for prefix in ("", "at-least-")},
        "kv_format": {"bf16", "qet4"},
        "reason": {reason.value for reason in Rejection},
        "outcome": {outcome.value for kind in (Outcome, ShadowOutcome) for outcome in kind},
    }
    for family in scrape(server).values():
        for sample in family.samples:
            for name, values in allowed.items():
                assert sample.labels.get(name) in {None, *values}, sample
