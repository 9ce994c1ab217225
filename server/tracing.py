"""OpenTelemetry traces of requests, where the packages of the extra `otel` are installed and an endpoint is given.

A request's spans are made when it has ended, from the times that were taken anyway: tokens pass through no tracer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anybit.server.config import ConfigError
from anybit.server.metrics.sequences import Outcome
from anybit.server.request_record import RequestRecord, SequenceRecord
from anybit.server.version import anybit_version

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer


@dataclass(frozen=True, slots=True)
class RequestTracer:
    """`record` a request that has ended; `close` sends what has not been sent."""

    record: Callable[[RequestRecord], None]
    close: Callable[[], None]


def build_request_tracer(endpoint: str) -> RequestTracer:
    """Spans go to `endpoint`, the base address of a collector that takes OTLP over HTTP.

    Raises ConfigError when the packages for it are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("Traces need OpenTelemetry; install it with pip install 'anybit[otel]'.") from error
    return tracer_of(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))


def tracer_of(exporter: "SpanExporter") -> RequestTracer:
    """Spans are handed to `exporter` in a thread of its own."""
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create({"service.name": "anybit", "service.version": anybit_version()})
    provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("anybit.server", anybit_version())
    return RequestTracer(lambda record: _record(tracer, record), provider.shutdown)


def _record(tracer: "Tracer", record: RequestRecord) -> None:
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    clock = _WallClock()
    span = tracer.start_span(
        f"{record.origin.operation} {record.origin.model}",
        TraceContextTextMapPropagator().extract(record.origin.trace_headers),
        SpanKind.SERVER,
        attributes={
            "gen_ai.operation.name": record.origin.operation,
            "gen_ai.request.model": record.origin.model,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "anybit.request_id": record.origin.request_id,
            "anybit.bit_width": record.bit_width,
            "anybit.kv_format": record.kv_format,
            "anybit.cached_tokens": record.num_cached_tokens,
            "anybit.outcome": record.outcomes,
        },
        start_time=clock.nanoseconds(record.origin.arrival),
    )
    if any(sequence.outcome in (Outcome.ERROR, Outcome.TIMEOUT) for sequence in record.sequences):
        span.set_status(Status(StatusCode.ERROR, record.outcomes))
    context = set_span_in_context(span)
    for choice, sequence in enumerate(record.sequences):
        _record_phases(tracer, context, clock, choice, sequence)
    span.end(clock.nanoseconds(record.end))


def _record_phases(
    tracer: "Tracer", context: "Context", clock: "_WallClock", choice: int, sequence: SequenceRecord
) -> None:
    """Spans of queue, prefill and decode. The engine's seconds are laid before the first token as it came here."""
    first, last = sequence.first_token_at, sequence.last_token_at
    if first is None or last is None:
        return
    scheduled = first - (sequence.prefill_seconds or 0.0)
    received = scheduled - (sequence.queue_seconds or 0.0)
    for name, begin, end in (("queue", received, scheduled), ("prefill", scheduled, first), ("decode", first, last)):
        attributes = {"anybit.choice": choice, "gen_ai.usage.output_tokens": sequence.num_generated_tokens}
        span = tracer.start_span(name, context, attributes=attributes, start_time=clock.nanoseconds(begin))
        span.end(clock.nanoseconds(end))


class _WallClock:
    """Unix time in nanoseconds of moments of the monotonic clock."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, moment: float) -> int:
        return int(moment * 1e9) + self._offset
