"""What is told of a request after its end: a log line, and spans where OpenTelemetry is there."""

import json
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from anybit.engine.logs import JsonFormatter
from anybit.server.config import ConfigError, ServerConfig
from anybit.server.tracing import build_request_tracer, tracer_of
from tests.server.fake_engine import FakeEngine
from tests.waiting import wait_until

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def lines():
    """Lines that the server logs, as JSON."""
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(json.loads(JsonFormatter().format(record)))
    logger = logging.getLogger("anybit.server")
    level = logger.level
    logger.setLevel("INFO")
    logger.addHandler(handler)
    yield logged
    logger.removeHandler(handler)
    logger.setLevel(level)


def last_line_of_a_request(lines):
    # It is written once the response has been sent.
    wait_until(lambda: any(line["message"].startswith("request ") for line in lines), "there is no line")
    return lines[-1]


def test_log_line_of_a_request_has_its_numbers_as_fields(start, lines):
    server = start(FakeEngine(num_cached_tokens=1))
    response = server.http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "Hello world", "max_tokens": 5, "n": 2, "bit_width": 3, "kv_format": "qet4"},
        headers={"X-Request-Id": "mine-1"},
    )
    assert response.status_code == 200
    line = last_line_of_a_request(lines)
    assert line["seconds"] > 0
    wanted = {
        "request_id": "mine-1", "operation": "text_completion", "bit_width": "3", "kv_format": "qet4", "choices": 2,
        "prompt_tokens": 2, "cached_tokens": 1, "generated_tokens": 10, "outcome": "length",
    }  # fmt: skip
    assert wanted.items() <= line.items()


def test_every_line_of_a_request_has_its_id(start, lines):
    server = start(FakeEngine(crash_after=0))
    server.http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}, headers={"X-Request-Id": "mine-2"})
    assert {line["request_id"] for line in lines if line["level"] == "ERROR"} == {"mine-2"}
    assert any("a secret detail" in line.get("exception", "") for line in lines)


@pytest.fixture
def spans(start):
    """A server whose spans are kept, and a function that waits for those of one request."""
    server, exporter = start(FakeEngine(token_seconds=0.002)), InMemorySpanExporter()
    tracer = tracer_of(exporter)
    server.service.observers.append(tracer.record)

    ended = []
    server.service.observers.append(ended.append)  # told after the tracer

    def finished():
        wait_until(lambda: bool(ended), "the request did not end")
        tracer.close()
        return {span.name: span for span in exporter.get_finished_spans()}

    return server, finished


def test_request_is_a_span_with_queue_prefill_and_decode_inside(spans):
    server, finished = spans
    server.http.post(
        "/v1/chat/completions",
        json={"model": "tiny@3bit", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5},
        headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "mine-3"},
    )
    named = finished()
    assert set(named) == {"chat tiny@3bit", "queue", "prefill", "decode"}
    request = named["chat tiny@3bit"]
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE_ID
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert request.attributes["gen_ai.usage.output_tokens"] == 5
    assert request.attributes["anybit.bit_width"] == "3"
    assert request.attributes["anybit.request_id"] == "mine-3"
    phases = [named[name] for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert phase.parent.span_id == request.context.span_id
        assert phase.start_time <= phase.end_time <= request.end_time
    assert [phase.end_time for phase in phases[:2]] == [phase.start_time for phase in phases[1:]]
    assert (phases[1].end_time - phases[1].start_time) == pytest.approx(0.5e9, rel=1e-3)
    assert (phases[2].end_time - phases[2].start_time) > 4 * 0.002e9


def test_failed_request_is_an_error_span(spans):
    server, finished = spans
    server.engine.fail_after = 2
    server.complete(max_tokens=5)
    assert finished()["text_completion tiny"].status.status_code is StatusCode.ERROR


def test_traces_without_opentelemetry_are_refused_with_a_sentence():
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"
        "from anybit.server.app import build_app\n"
        "from anybit.server.tracing import build_request_tracer\n"
        "try: build_request_tracer('http://127.0.0.1:4318')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ConfigError Traces need OpenTelemetry; install it with pip install 'anybit[otel]'."


@pytest.fixture
def collector():
    """What is posted to a collector, and its address."""
    posted = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield posted, f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_spans_reach_a_collector(start, collector):
    posted, url = collector
    server = start(FakeEngine(), otlp_endpoint=url)
    ended = []
    server.service.observers.append(ended.append)
    server.complete(max_tokens=2)
    wait_until(lambda: bool(ended), "the request did not end")
    server.service.tracer.close()
    wait_until(lambda: bool(posted), "no span arrived")
    path, body = posted[0]
    assert path == "/v1/traces"
    assert b"text_completion tiny" in body


def test_address_of_a_collector_must_be_one(checkpoint):
    with pytest.raises(ConfigError, match="must begin with http"):
        ServerConfig("tiny", checkpoint, otlp_endpoint="localhost:4318")
    assert build_request_tracer("http://127.0.0.1:1/").close() is None
