"""What the engine last said of itself, read when somebody scrapes."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from anybit.engine.client import EngineClient
from anybit.engine.types import EngineStats, ModelInfo
from anybit.server.version import anybit_version


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
        memory = {**stats.device_memory, "free": stats.device_free_bytes}
        yield _gauge(
            "device_memory_bytes",
            "Memory that the engine holds of its device, by kind; of the kind free what nobody holds.",
            ("model", "kind"),
            [((self._model_name, kind), size) for kind, size in memory.items()],
        )
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


def _gauge(
    name: str, text: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"anybit_{name}", text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
