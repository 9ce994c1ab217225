"""Everything that /metrics shows; the only module that knows Prometheus."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client import generate_latest as render_registry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from anybit.engine.client import EngineClient
from anybit.engine.types import EngineStats, ModelInfo
from anybit.server.errors import Rejection
from anybit.server.version import anybit_version

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
# The first edges lie below 10 ms, because that is where a lower width shows.
_ITL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Outcome(StrEnum):
    """How a sequence ended; the values of the `outcome` metric label."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REJECTED = "rejected"
    TIMEOUT = "timeout"


class Metrics:
    """All series of one server, in a registry of its own.

    A request here is one sequence, as in the engine: an HTTP request for three choices counts three times.
    """

    def __init__(self, model_name: str, engine: EngineClient, is_ready: Callable[[], bool]) -> None:
        self._model_name = model_name
        self._engine = engine
        self._registry = _PlainRegistry()
        self._widths: dict[str, WidthMetrics] = {}
        labels = ("model", "bit_width")
        self._rejections = Counter(
            "anybit_rejections", "HTTP requests refused.", ("model", "reason"), registry=self._registry
        )
        self._step_tokens = Histogram(
            "anybit_step_tokens", "Tokens of one engine step.", ("model",), buckets=_STEP_BUCKETS,
            registry=self._registry,
        ).labels(model_name)  # fmt: skip
        self._requests = Counter("anybit_requests", "Sequences ended.", (*labels, "outcome"), registry=self._registry)
        self._prompt_tokens = Counter(
            "anybit_prompt_tokens", "Prompt tokens of sequences begun.", labels, registry=self._registry
        )
        self._generated_tokens = Counter(
            "anybit_generated_tokens", "Tokens generated.", labels, registry=self._registry
        )

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"anybit_{name}", text, labels, buckets=tuple(buckets), registry=self._registry)

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token.", _TTFT_BUCKETS
        )
        self._inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of one sequence.", _ITL_BUCKETS
        )
        self._duration = histogram(
            "request_duration_seconds", "From the arrival of a request to its last token.", _DURATION_BUCKETS
        )
        self._queue = histogram(
            "request_queue_seconds", "From the engine's receipt to the first schedule.", _DURATION_BUCKETS
        )
        self._prefill = histogram(
            "request_prefill_seconds", "From the first schedule to the first token.", _DURATION_BUCKETS
        )
        self._decode = histogram("request_decode_seconds", "From the first token to the last.", _DURATION_BUCKETS)
        for reason in Rejection:
            self._rejections.labels(model_name, reason)
        self._registry.register(EngineCollector(model_name, engine, is_ready))
        ProcessCollector(registry=self._registry)

    def width(self, label: str) -> "WidthMetrics":
        """The series of one bit-width; kept, because looking them up for every token would cost."""
        if label not in self._widths:
            self._widths[label] = WidthMetrics(
                requests={outcome: self._requests.labels(self._model_name, label, outcome) for outcome in Outcome},
                prompt_tokens=self._prompt_tokens.labels(self._model_name, label),
                generated_tokens=self._generated_tokens.labels(self._model_name, label),
                time_to_first_token=self._time_to_first_token.labels(self._model_name, label),
                inter_token_latency=self._inter_token_latency.labels(self._model_name, label),
                duration=self._duration.labels(self._model_name, label),
                queue=self._queue.labels(self._model_name, label),
                prefill=self._prefill.labels(self._model_name, label),
                decode=self._decode.labels(self._model_name, label),
            )
        return self._widths[label]

    def count_rejection(self, reason: Rejection) -> None:
        self._rejections.labels(self._model_name, reason).inc()

    def render(self) -> bytes:
        """The text that a scrape gets."""
        for num_tokens in self._engine.take_step_tokens():
            self._step_tokens.observe(num_tokens)
        if self._engine.model is not None:
            for bit_width in self._engine.model.bit_widths:
                self.width(str(bit_width))
        return render_registry(self._registry)


@dataclass(frozen=True, slots=True)
class WidthMetrics:
    """The request-level series of one bit-width."""

    requests: dict[Outcome, Counter]
    prompt_tokens: Counter
    generated_tokens: Counter
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    duration: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram

    def record_scheduled(self, queue_seconds: float | None, prefill_seconds: float | None) -> None:
        if queue_seconds is not None:
            self.queue.observe(queue_seconds)
        if prefill_seconds is not None:
            self.prefill.observe(prefill_seconds)

    def record_first_tokens(self, num_prompt_tokens: int, num_tokens: int, seconds: float) -> None:
        self.prompt_tokens.inc(num_prompt_tokens)
        self.generated_tokens.inc(num_tokens)
        self.time_to_first_token.observe(seconds)

    def record_next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Tokens that came together share the time since the last ones."""
        self.generated_tokens.inc(num_tokens)
        for _ in range(num_tokens):
            self.inter_token_latency.observe(seconds / num_tokens)

    def record_end(self, outcome: Outcome, duration_seconds: float, decode_seconds: float | None) -> None:
        self.requests[outcome].inc()
        self.duration.observe(duration_seconds)
        if decode_seconds is not None:
            self.decode.observe(decode_seconds)


class EngineCollector:
    """Gauges and counters read from the engine's newest snapshot at the moment of a scrape."""

    def __init__(self, model_name: str, engine: EngineClient, is_ready: Callable[[], bool]) -> None:
        self._model_name = model_name
        self._engine = engine
        self._is_ready = is_ready
        self._num_steps = 0
        self._last_step_timestamp = 0.0

    def collect(self) -> Iterator[Metric]:
        yield _gauge("build_info", "Always 1.", ("version",), [((anybit_version(),), 1)])
        yield self._per_model("ready", "Whether requests are accepted.", float(self._is_ready()))
        stats = self._engine.stats()
        yield from self._engine_metrics(stats)
        model = self._engine.model
        if model is not None:
            yield from self._model_metrics(model)
            yield from self._load_metrics(model, stats)

    def _engine_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        if stats.steps != self._num_steps:
            # The engine counts steps and sends its snapshot after one, so the snapshot's age is the step's.
            self._num_steps = stats.steps
            self._last_step_timestamp = time.time() - self._engine.health().seconds_since_heartbeat
        yield self._per_model(
            "engine_last_step_timestamp_seconds",
            "Unix time of the newest engine step, to the accuracy of a scrape.",
            self._last_step_timestamp,
        )
        yield self._per_model("engine_resident_bytes", "Resident memory of the engine process.", stats.resident_bytes)
        fallbacks = CounterMetricFamily(
            "anybit_kernel_fallbacks", "Calls that took a slow path.", labels=("model", "kernel", "reason")
        )
        for key, count in stats.kernel_fallbacks.items():
            kernel, _, reason = key.partition(":")
            fallbacks.add_metric((self._model_name, kernel, reason), count)
        yield fallbacks

    def _model_metrics(self, model: ModelInfo) -> Iterator[Metric]:
        info_labels = (
            "model", "bit_width", "effective_bits", "effective_bits_with_head", "lm_head_bits", "method", "kv_format",
            "device", "compute_dtype", "reproducible",
        )  # fmt: skip
        yield _gauge(
            "model_info", "Always 1; one series per bit-width.", info_labels,
            [
                (
                    (
                        self._model_name, str(width.bit_width), f"{width.effective_bits:.4g}",
                        f"{width.effective_bits_with_head:.4g}", str(model.lm_head_bits), model.method,
                        model.kv_format, model.device, model.compute_dtype, str(model.reproducible).lower(),
                    ),
                    1,
                )
                for width in model.widths
            ],
        )  # fmt: skip
        yield _gauge(
            "weights_bytes", "Weight bytes held in memory.", ("model", "kind"),
            [((self._model_name, kind), size) for kind, size in model.weights_bytes.items()],
        )  # fmt: skip
        yield _gauge(
            "weights_equivalent_bytes", "What a checkpoint of this width alone would hold in memory.",
            ("model", "bit_width"),
            [((self._model_name, str(width.bit_width)), width.equivalent_bytes) for width in model.widths],
        )  # fmt: skip
        yield _gauge(
            "kv_bytes_per_token", "KV cache bytes of one token.", ("model", "kv_format"),
            [((self._model_name, kv.name), kv.bytes_per_token) for kv in model.kv_formats],
        )  # fmt: skip
        yield _gauge(
            "kv_capacity_tokens", "Tokens whose keys and values fit the KV cache.", ("model", "kv_format"),
            [((self._model_name, kv.name), kv.capacity_tokens) for kv in model.kv_formats],
        )  # fmt: skip
        yield _gauge(
            "kv_layers_raised", "Layers that the start-up check has put into 8 bits.", ("model", "kv_format"),
            [((self._model_name, kv.name), len(kv.raised_layers)) for kv in model.kv_formats],
        )  # fmt: skip

    def _load_metrics(self, model: ModelInfo, stats: EngineStats) -> Iterator[Metric]:
        def per_width(name: str, text: str, values: dict[int, int]) -> Metric:
            samples = [((self._model_name, str(width)), values.get(width, 0)) for width in model.bit_widths]
            return _gauge(name, text, ("model", "bit_width"), samples)

        yield per_width("requests_running", "Sequences being prefilled or decoded.", stats.running)
        yield per_width("requests_waiting", "Sequences not yet scheduled.", stats.waiting)
        bytes_read = CounterMetricFamily(
            "anybit_weight_bytes_read", "Weight bytes read by engine steps.", labels=("model", "bit_width")
        )
        for width in model.bit_widths:
            bytes_read.add_metric((self._model_name, str(width)), stats.weight_bytes_read.get(width, 0))
        yield bytes_read
        yield self._per_model_counter(
            "prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.", stats.prefix_queried_tokens
        )
        yield self._per_model_counter(
            "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens
        )
        yield self._per_model_counter(
            "preemptions", "Sequences that lost their KV pages to older ones and were computed again.",
            stats.preemptions,
        )  # fmt: skip
        yield self._per_format_counter(
            "kv_sealed_pages", "Pages of keys and values encoded, over all layers.", model, stats.sealed_pages
        )
        yield self._per_format_counter("kv_seal_seconds", "Time spent encoding them.", model, stats.seal_seconds)
        usage, sizes = [], []
        for kv in model.kv_formats:
            labels = (self._model_name, kv.name)
            total, used, cached = (
                part.get(kv.name, 0) for part in (stats.kv_bytes_total, stats.kv_bytes_used, stats.kv_bytes_cached)
            )
            usage.append((labels, used / total if total else 0.0))
            states = {"used": used, "cached": cached, "free": max(0, total - used - cached)}
            sizes += [((*labels, state), size) for state, size in states.items()]
        yield _gauge("kv_cache_usage_ratio", "Share of the KV cache's pages in use.", ("model", "kv_format"), usage)
        yield _gauge("kv_cache_bytes", "KV cache bytes by state.", ("model", "kv_format", "state"), sizes)

    def _per_model(self, name: str, text: str, value: float) -> Metric:
        return _gauge(name, text, ("model",), [((self._model_name,), value)])

    def _per_model_counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"anybit_{name}", text, labels=("model",))
        family.add_metric((self._model_name,), value)
        return family

    def _per_format_counter(self, name: str, text: str, model: ModelInfo, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(f"anybit_{name}", text, labels=("model", "kv_format"))
        for kv in model.kv_formats:
            family.add_metric((self._model_name, kv.name), values.get(kv.name, 0))
        return family


class _PlainRegistry(CollectorRegistry):
    """A registry without the `_created` series, which double the text of a scrape and tell nothing here."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def _gauge(
    name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"anybit_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
