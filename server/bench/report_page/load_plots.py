"""Plots over the load, one line per width: latency, throughput, goodput."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anybit.server.bench.load import Load
from anybit.server.bench.report import load_text
from anybit.server.bench.report_page.axis import Axis, load_axis, value_axis
from anybit.server.bench.report_page.number_text import number, percent
from anybit.server.bench.report_page.plot import LinePlot, Point, Series, Table

# A limit further above the highest value would press all lines to the ground.
_FARTHEST_LIMIT = 3.0
_SHARE_MARKS = tuple((quarter / 4, percent(quarter / 4)) for quarter in range(5))

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """The rows of a report by width and load."""

    rows: Sequence[Row]

    @property
    def bit_widths(self) -> list[int | None]:
        return list(dict.fromkeys(row["bit_width"] for row in self.rows))

    @property
    def loads(self) -> list[Load]:
        """In the order of the report, which is ascending."""
        return list(dict.fromkeys(map(_load, self.rows)))

    def of_width(self, bit_width: int | None) -> list[Row]:
        return [row for row in self.rows if row["bit_width"] == bit_width]


def width_name(bit_width: int | None) -> str:
    return "default" if bit_width is None else f"{bit_width} bits"


def latency_plots(report: Row) -> list[LinePlot]:
    """Time to first token and time per further token: the median, and what 1 of 100 requests exceeds."""
    settings = report["settings"]
    measures = (
        ("ttft_ms", "Time to first token", settings["slo_ttft_ms"]),
        ("tpot_ms", "Time per further token", settings["slo_tpot_ms"]),
    )
    return [
        _plot(
            report["rows"],
            f"{field}-{name}",
            f"{title}, {words} (ms)",
            _time(field, name),
            limit=None if limit is None else (limit, f"SLO {limit:g} ms"),
        )
        for field, title, limit in measures
        for name, words in (("p50", "median"), ("p99", "p99"))
    ]


def _time(field: str, name: str) -> Callable[[Row], float | None]:
    def read(row: Row) -> float | None:
        milliseconds: float | None = row[field][name]
        return milliseconds

    return read


def throughput_plots(report: Row) -> list[LinePlot]:
    return [
        _plot(report["rows"], "tokens", "Tokens per second, all requests together", lambda r: r["tokens_per_second"]),
        _plot(report["rows"], "requests", "Answers per second", lambda row: row["requests_per_second"]),
    ]


def goodput_plots(report: Row) -> list[LinePlot]:
    """None where no goal was given."""
    if report["slo_met_up_to"] is None:
        return []
    rows, share = report["rows"], report["settings"]["slo_share"]
    return [
        _plot(rows, "good", "Requests per second that met the SLO", lambda row: row["goodput_requests_per_second"]),
        _plot(
            rows,
            "good-share",
            "Share of requests that met the SLO",
            lambda row: row["goodput_share"],
            text=percent,
            y=Axis("", 0.0, 1.0, marks=_SHARE_MARKS),
            limit=(share, percent(share)),
        ),
    ]


def _plot(
    rows: Sequence[Row],
    key: str,
    title: str,
    value: Callable[[Row], float | None],
    text: Callable[[float | None], str] = number,
    y: Axis | None = None,
    limit: tuple[float, str] | None = None,
) -> LinePlot:
    measured = Measured(rows)
    loads, widths = measured.loads, measured.bit_widths
    x, places = load_axis(loads)

    def point(row: Row) -> Point | None:
        found = value(row)
        name = f"{width_name(row['bit_width'])}, {load_text(row)}: {text(found)}"
        return None if found is None else Point(places[_load(row)], found, name)

    series = tuple(
        Series(width_name(width), tone, tuple(point(row) for row in measured.of_width(width)))
        for tone, width in enumerate(widths)
    )
    cells = {(row["bit_width"], _load(row)): text(value(row)) for row in rows}
    table = Table(
        (x.title, *map(width_name, widths)),
        tuple((_name(load), *(cells.get((width, load), "–") for width in widths)) for load in loads),
    )
    values = [point.y for line in series for point in line.points if point is not None]
    if limit is not None and limit[0] <= _FARTHEST_LIMIT * max(values, default=0.0):
        values.append(limit[0])
    summary = "; ".join(
        f"{line.name}: {', '.join(text(point.y) if point else 'not measured' for point in line.points)}"
        for line in series
    )
    axis = y or value_axis(title, values)
    return LinePlot(
        key, title, f"By {x.title} {', '.join(map(_name, loads))}. {summary}.", x, axis, series, table, limit
    )


def _load(row: Row) -> Load:
    if row["request_rate"] is not None:
        return Load("request_rate", float(row["request_rate"]))
    return Load("concurrency", row["concurrency"])


def _name(load: Load) -> str:
    return "all at once" if load.number == float("inf") else f"{load.number:g}"
