"""How far answers are from those of the highest width, as far as they were scored again."""

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter


class ShadowOutcome(StrEnum):
    """What became of an answer that was chosen; the values of the `outcome` metric label."""

    SCORED = "scored"
    SKIPPED = "skipped"  # too long, empty, or too many others were waiting
    FAILED = "failed"


class QualityMetrics:
    """Series of the widths at which something was scored again; a mean per token is a ratio of two of them."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model_name = model_name
        labels = ("model", "bit_width")
        self._requests = Counter(
            "anybit_shadow_requests", "Answers chosen to be scored again.", (*labels, "outcome"), registry=registry
        )
        self._tokens = Counter(
            "anybit_shadow_tokens", "Tokens of answers that were scored again.", labels, registry=registry
        )
        self._kl_nats = Counter(
            "anybit_shadow_kl_nats",
            "Sum over these tokens of KL(highest width || this width) of the distributions that they were drawn from, "
            "with the tokens that are not among the 32 likeliest of both counted as one: a lower bound.",
            labels,
            registry=registry,
        )
        self._agreements = Counter(
            "anybit_shadow_top1_agreements",
            "Those of these tokens at whose place both widths find the same token the likeliest.",
            labels,
            registry=registry,
        )

    def create(self, label: str) -> None:
        """Show a width's series from the start, at 0."""
        for outcome in ShadowOutcome:
            self._requests.labels(self._model_name, label, outcome)
        for counter in (self._tokens, self._kl_nats, self._agreements):
            counter.labels(self._model_name, label)

    def count(self, label: str, outcome: ShadowOutcome) -> None:
        self._requests.labels(self._model_name, label, outcome).inc()

    def record(self, label: str, num_tokens: int, kl_nats: float, num_agreements: int) -> None:
        """An answer was scored."""
        self.count(label, ShadowOutcome.SCORED)
        self._tokens.labels(self._model_name, label).inc(num_tokens)
        self._kl_nats.labels(self._model_name, label).inc(kl_nats)
        self._agreements.labels(self._model_name, label).inc(num_agreements)
