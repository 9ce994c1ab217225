"""Draws what the dashboards show, from the same queries, without Grafana. Needs `pip install 'anybit[dashboards]'`.

python deploy/grafana/render.py --prometheus http://127.0.0.1:9090 --minutes 10 --out .
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from queries import PanelQuery, Prometheus, Series, dashboards, panel_queries

_COLUMNS = 24
_INCHES_PER_COLUMN, _INCHES_PER_LINE = 0.68, 0.40
_POINTS = 240
_FONT = 8
_LEGEND: dict[str, Any] = {"ncols": 5, "columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.4}


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """Unix times."""

    start: float
    end: float

    @property
    def step(self) -> float:
        return max(1.0, (self.end - self.start) / _POINTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=30, help="how far to look back")
    parser.add_argument("--rate-interval", default="1m", help="what Grafana would fill in for $__rate_interval")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for one PNG per dashboard")
    options = parser.parse_args()
    now = time.time()
    span = TimeSpan(now - 60 * options.minutes, now)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, dashboard in dashboards().items():
        queries = list(panel_queries(name, dashboard, options.rate_interval))
        draw(dashboard, queries, Prometheus(options.prometheus), span).savefig(options.out / f"{name}.png", dpi=90)


def draw(dashboard: dict[str, Any], queries: list[PanelQuery], prometheus: Prometheus, span: TimeSpan) -> Figure:
    """One figure with all panels where Grafana would place them."""
    mpl.rcParams.update({"font.size": _FONT, "axes.titlesize": _FONT + 1, "axes.prop_cycle": _colours()})
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 1
    figure = Figure(figsize=(_COLUMNS * _INCHES_PER_COLUMN, lines * _INCHES_PER_LINE))
    figure.suptitle(
        dashboard["title"], x=0.01, y=1 - 0.2 / lines, ha="left", va="top", fontsize=_FONT + 6, weight="bold"
    )
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] / _COLUMNS, 1 - (place["y"] + 1) / lines
        width, height = place["w"] / _COLUMNS, place["h"] / lines
        if panel["type"] == "row":
            figure.text(0.01, top - height * 0.7, panel["title"], fontsize=_FONT + 3, weight="bold", color="#444")
            continue
        margin, head, foot = 0.045, 0.9 / lines, 1.9 / lines
        axes = figure.add_axes((left + margin, top - height + foot, width - 1.25 * margin, height - head - foot))
        axes.set_title(panel["title"], loc="left")
        own = [query for query in queries if query.panel is panel]
        _draw_panel(axes, panel, own, prometheus, span)
    return figure


def _draw_panel(
    axes: Axes, panel: dict[str, Any], queries: list[PanelQuery], prometheus: Prometheus, span: TimeSpan
) -> None:
    if panel["type"] == "timeseries":
        named = [
            (query.name(series.labels), series)
            for query in queries
            for series in prometheus.query_range(query.expression, span.start, span.end, span.step)
        ]
        _draw_lines(axes, panel, named, span)
        return
    newest = [(query.name(series.labels), series) for query in queries for series in prometheus.query(query.expression)]
    match panel["type"]:
        case "stat":
            axes.axis("off")
            value = newest[0][1].points[-1][1] if newest and newest[0][1].points else float("nan")
            text = axes.text(0, 0.3, format_value(value, _unit(panel)), fontsize=_FONT + 12, color="#1f6f4a")
            text.set_transform(axes.transAxes)
        case "bargauge":
            _draw_bars(axes, panel, [(name, series.points[-1][1]) for name, series in newest if series.points])
        case _:
            _draw_table(axes, [series.labels for _, series in newest])


def _draw_lines(axes: Axes, panel: dict[str, Any], named: list[tuple[str, Series]], span: TimeSpan) -> None:
    named = sorted(((name, series) for name, series in named if series.points), key=lambda pair: _natural(pair[0]))
    if not named:
        axes.axis("off")
        axes.text(0.02, 0.5, panel["fieldConfig"]["defaults"].get("noValue", "no data"), transform=axes.transAxes)
        return
    if panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal":
        times = sorted({moment for _, series in named for moment, _ in series.points})
        heights = [[dict(series.points).get(moment, 0.0) for moment in times] for _, series in named]
        axes.stackplot(
            [moment - span.start for moment in times], heights, labels=[name for name, _ in named], alpha=0.75
        )
    else:
        for name, series in named:
            moments, values = _with_gaps(series.points, span)
            axes.plot(moments, values, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, span.end - span.start)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, _unit(panel))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=_FONT - 1.5, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.1), **_LEGEND)


def _with_gaps(points: list[tuple[float, float]], span: TimeSpan) -> tuple[list[float], list[float]]:
    """Seconds since the start, and values; a line ends where some are missing."""
    moments, values = [], []
    for (moment, value), (following, _) in zip(points, [*points[1:], points[-1]], strict=True):
        moments.append(moment - span.start)
        values.append(value)
        if following - moment > 3 * span.step:
            moments.append(moment - span.start)
            values.append(float("nan"))
    return moments, values


def _draw_bars(axes: Axes, panel: dict[str, Any], values: list[tuple[str, float]]) -> None:
    values = sorted(values, key=lambda pair: _natural(pair[0]), reverse=True)
    for position, (name, value) in enumerate(values):
        axes.barh(name, value, color=f"C{(len(values) - 1 - position) % 10}", alpha=0.8)
        axes.text(value, position, " " + format_value(value, _unit(panel)), va="center")
    axes.set_xlim(0, 1.25 * max((value for _, value in values), default=1.0) or 1.0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_table(axes: Axes, rows: list[dict[str, str]]) -> None:
    axes.axis("off")
    rows = sorted(rows, key=lambda labels: _natural(labels.get("bit_width", "")))
    if rows:
        table = axes.table(
            [list(row.values()) for row in rows], colLabels=[name.replace("_", "\n") for name in rows[0]], loc="center"
        )
        table.auto_set_font_size(False)
        table.scale(1, 1.25)
        for (line, _), cell in table.get_celld().items():
            cell.set_edgecolor("#ccc")
            if line == 0:
                cell.set_height(3 * cell.get_height())


def format_value(value: float, unit: str) -> str:
    """A number in one of the units of Grafana's that the dashboards use."""
    match unit:
        case "s":
            scale, suffix = next(
                ((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if abs(value) >= s), (1, "s")
            )
            return f"{value / scale:.3g} {suffix}"
        case "bytes" | "Bps":
            power = min(4, max(0, next((p for p in range(5) if abs(value) < 1024 ** (p + 1)), 4)))
            return (
                f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}{'/s' if unit == 'Bps' else ''}"
            )
        case "percentunit":
            return f"{100 * value:.3g} %"
        case "reqps" | "cps":
            return f"{value:.3g} /s"
        case _:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _unit(panel: dict[str, Any]) -> str:
    return str(panel["fieldConfig"]["defaults"]["unit"])


def _natural(name: str) -> tuple[float, str]:
    """Widths by their number, then names by the alphabet."""
    head = name.split(" ", 1)[0]
    return (float(head), name) if head.isdigit() else (1e9, name)


def _colours() -> Any:
    return mpl.cycler(color=["#3b7dd8", "#e08a2e", "#3fa65a", "#c94f4f", "#8a63c9", "#6b7280", "#d4689d", "#2aa3a3"])


if __name__ == "__main__":
    main()
