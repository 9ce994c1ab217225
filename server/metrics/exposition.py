"""All series of one server, and their text."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, Metric, ProcessCollector
from prometheus_client import generate_latest as render_registry

from anybit.engine.client import EngineClient
from anybit.server.errors import Rejection
from anybit.server.metrics.engine_collector import EngineCollector
from anybit.server.metrics.quality import QualityMetrics
from anybit.server.metrics.sequences import Outcome, WidthMetrics

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
)  # fmt: skip
# Quantiles are interpolated between edges: where widths differ by a fifth, edges must not lie further apart.
_ITL_BUCKETS = (
    0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.007, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.5, 1, 2.5,
)  # fmt: skip
_DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
_STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


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
        self.quality = QualityMetrics(model_name, self._registry)
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
                self.quality.create(str(bit_width))
        return render_registry(self._registry)


class _PlainRegistry(CollectorRegistry):
    """A registry without the `_created` series, which double the text of a scrape and tell nothing here."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
