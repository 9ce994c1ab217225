"""Expressions that panels share; `$model` and `$__rate_interval` are Grafana's to fill in."""

from collections.abc import Iterable

from panels import Query

MODEL = 'model=~"$model"'


def rate(metric: str, by: str) -> str:
    by_clause = f"sum by ({by})" if by else "sum"
    return f"{by_clause} (rate({metric}{{{MODEL}}}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "") -> str:
    labels = ", ".join(filter(None, (by, "le")))
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels)})"


def mean(metric: str, by: str = "") -> str:
    return f"{rate(f'{metric}_sum', by)} / ({rate(f'{metric}_count', by)} > 0)"


def quantiles(metric: str, shares: Iterable[float] = (0.5, 0.95, 0.99)) -> list[Query]:
    return [Query(quantile(share, metric), f"p{share * 100:.0f}") for share in shares]


def by_width(expression: str) -> list[Query]:
    return [Query(expression, "{{bit_width}} bits")]


def recorded(rule: str) -> list[Query]:
    """A recording rule by width, of several models the largest."""
    return by_width(f"max by (bit_width) ({rule}{{{MODEL}}})")
