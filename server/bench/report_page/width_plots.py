"""Plots of what a width costs and is worth: memory, quality, and one against the other."""

from typing import Any

from anybit.server.bench.report_page.axis import value_axis
from anybit.server.bench.report_page.load_plots import Measured, width_name
from anybit.server.bench.report_page.number_text import byte_size, byte_unit, number, percent
from anybit.server.bench.report_page.plot import Bar, BarPlot, LinePlot, Point, Series, Table

Row = dict[str, Any]


def memory_plots(report: Row) -> list[BarPlot]:
    """Weights at rest and as they are read, and the device; empty for a server that tells nothing."""
    resources = report["resources"]
    if resources is None:
        return []
    plots = []
    resident = sum(resources["weights_bytes"].values())
    alone = [row for row in resources["widths"] if row["equivalent_bytes"] is not None]
    if resident and alone:
        bars = [_width_bar(report, row, "equivalent_bytes") for row in alone]
        together = sum(row["equivalent_bytes"] for row in alone)
        bars += [_bar(f"{len(alone)} such models", together), _bar("this server", resident)]
        plots.append(_bars("weights", "Weights in memory: models of one width each, and this server with all", bars))
    read = [row for row in resources["widths"] if row["bytes_read_per_token"] is not None]
    if read:
        bars = [_width_bar(report, row, "bytes_read_per_token") for row in read]
        plots.append(_bars("read", "Weights read for a token of one request", bars))
    formats = resources["kv_formats"]
    if len(formats) > 1:  # a single one is in the table
        bars = [_bar(row["kv_format"], row["bytes_per_token"]) for row in formats]
        plots.append(_bars("kv", "Keys and values of one token, by KV format", bars))
    held = {kind: size for kind, size in resources["device_memory_bytes"].items() if size and kind != "free"}
    if held:
        bars = [_bar(kind.replace("_", " "), size) for kind, size in held.items()]
        plots.append(_bars("device", "Memory that the engine holds of its device", bars))
    return plots


def quality_plots(report: Row) -> list[LinePlot]:
    """Perplexity against what a width reads, and against its speed; empty where none was measured."""
    scored = {row["bit_width"]: row["perplexity"] for row in (report["quality"] or {"results": []})["results"]}
    widths = [width for width in Measured(report["rows"]).bit_widths if width in scored]
    if not widths:
        return []
    perplexity = {width: scored[width] for width in widths}
    costs = _read_costs(report)
    speeds = best_speeds(report)
    worth = {width: speeds[width] for width in widths}
    plots = [_against(report, "worth", "What a bit is worth: perplexity against speed", "tokens/s", worth, perplexity)]
    if all(costs.get(width) for width in widths):
        divisor, unit = byte_unit(max(costs[width] for width in widths))
        read = {width: costs[width] / divisor for width in widths}
        title = "Perplexity against weights read per token"
        return [_against(report, "bytes", title, f"{unit} read", read, perplexity), *plots]
    if None not in widths:
        bits = {width: float(width or 0) for width in widths}
        return [_against(report, "bits", "Perplexity against bits", "bits", bits, perplexity), *plots]
    return plots


def live_quality_plots(report: Row) -> list[BarPlot]:
    """KL divergence of answers that the server scored again; empty where it scored none."""
    rows = [] if report["resources"] is None else report["resources"]["live_quality"]
    if not rows:
        return []
    bars = tuple(
        Bar(width_name(row["bit_width"]), row["kl"], number(row["kl"]), _tone(report, row["bit_width"])) for row in rows
    )
    table = Table(
        ("width", "KL, nats per token", "same likeliest token", "tokens"),
        tuple(
            (width_name(row["bit_width"]), number(row["kl"]), percent(row["top1_agreement"]), f"{row['tokens']:,}")
            for row in rows
        ),
    )
    title = "Live quality: KL divergence from the highest width, nats per token"
    return [BarPlot("live", title, _bar_summary(bars), bars, table)]


def best_speeds(report: Row) -> dict[int | None, float]:
    """Per width the most tokens per second of any load."""
    measured = Measured(report["rows"])
    return {width: max(row["tokens_per_second"] for row in measured.of_width(width)) for width in measured.bit_widths}


def _against(
    report: Row, key: str, title: str, unit: str, costs: dict[int | None, float], perplexity: dict[int | None, float]
) -> LinePlot:
    """One point per width, joined in the order of the widths."""

    def series(width: int | None, cost: float) -> Series:
        text = f"{width_name(width)}: {number(perplexity[width])} at {number(cost)} {unit}"
        return Series(width_name(width), _tone(report, width) or 0, (Point(cost, perplexity[width], text),))

    lines = tuple(series(width, cost) for width, cost in costs.items())
    rows = tuple((width_name(width), number(cost), number(perplexity[width])) for width, cost in costs.items())
    return LinePlot(
        key,
        title,
        "; ".join(point.text for line in lines for point in line.points if point is not None) + ".",
        value_axis(unit, list(costs.values()), from_zero=False),
        value_axis("perplexity", list(perplexity.values()), from_zero=False),
        lines,
        Table(("width", unit, "perplexity"), rows),
        is_joined=True,
    )


def _read_costs(report: Row) -> dict[int | None, float]:
    rows = [] if report["resources"] is None else report["resources"]["widths"]
    return {row["bit_width"]: row["bytes_read_per_token"] for row in rows}


def _tone(report: Row, bit_width: int | None) -> int | None:
    """That of the width's lines, None for one that was not measured."""
    widths = Measured(report["rows"]).bit_widths
    return widths.index(bit_width) if bit_width in widths else None


def _width_bar(report: Row, row: Row, field: str) -> Bar:
    return Bar(width_name(row["bit_width"]), row[field], byte_size(row[field]), _tone(report, row["bit_width"]))


def _bar(name: str, size: float) -> Bar:
    return Bar(name, size, byte_size(size), None)


def _bars(key: str, title: str, bars: list[Bar]) -> BarPlot:
    table = Table(("", "size"), tuple((bar.name, bar.text) for bar in bars))
    return BarPlot(key, title, _bar_summary(tuple(bars)), tuple(bars), table)


def _bar_summary(bars: tuple[Bar, ...]) -> str:
    return "; ".join(f"{bar.name}: {bar.text}" for bar in bars) + "."
