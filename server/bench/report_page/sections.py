"""The report section by section: plots, what is said about them, and tables."""

from dataclasses import dataclass
from typing import Any

from anybit.server.bench.notes import notes
from anybit.server.bench.report import load_text
from anybit.server.bench.report_page.load_plots import (
    Measured,
    goodput_plots,
    latency_plots,
    throughput_plots,
    width_name,
)
from anybit.server.bench.report_page.number_text import byte_size, number, percent
from anybit.server.bench.report_page.plot import BarPlot, LinePlot, Table
from anybit.server.bench.report_page.width_plots import best_speeds, live_quality_plots, memory_plots, quality_plots

Report = dict[str, Any]

_TIMES = (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("tpot_ms", "TPOT"), ("latency_ms", "whole answer"))
_PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    sentences: tuple[str, ...] = ()
    plots: tuple[LinePlot | BarPlot, ...] = ()
    table: Table | None = None


def sections(report: Report) -> list[Section]:
    """All that has something to show or to say."""
    found = [
        Section("At a glance", table=_overview(report)),
        Section("Latency and throughput", _load_sentences(report), (*latency_plots(report), *throughput_plots(report))),
        _goodput(report),
        _memory(report),
        _quality(report),
        Section("Notes", tuple(notes(report))),
        Section("All times", ("Milliseconds.",), table=_all_times(report)),
        Section("Settings", table=_settings(report)),
    ]
    return [section for section in found if section.sentences or section.plots or section.table]


def _overview(report: Report) -> Table:
    """One row per width; latency at the lowest load, which is the server's own, and throughput at its best one."""
    measured, speeds = Measured(report["rows"]), best_speeds(report)
    resources = {row["bit_width"]: row for row in (report["resources"] or {"widths": []})["widths"]}
    perplexity = {row["bit_width"]: row["perplexity"] for row in (report["quality"] or {"results": []})["results"]}
    met = {row["bit_width"]: load_text(row) for row in report["slo_met_up_to"] or ()}
    lowest = load_text(report["rows"][0])
    columns = ["width", "tokens/s, most", f"TTFT p50 ms, {lowest}", f"TPOT p50 ms, {lowest}"]
    columns += ["SLO met up to"] * bool(met) + ["effective bits", "read per token"] * bool(resources)
    rows = []
    for width in measured.bit_widths:
        first, costs = measured.of_width(width)[0], resources.get(width, {})
        cells = [width_name(width), *map(number, (speeds[width], first["ttft_ms"]["p50"], first["tpot_ms"]["p50"]))]
        cells += [met[width]] if met else []
        cells += (
            [number(costs.get("effective_bits")), byte_size(costs.get("bytes_read_per_token"))] if resources else []
        )
        rows.append((*cells, *([number(perplexity.get(width))] if perplexity else [])))
    return Table((*columns, *(["perplexity"] if perplexity else [])), tuple(rows))


def _load_sentences(report: Report) -> tuple[str, ...]:
    option = "--concurrency 1,2,4,8" if report["rows"][0]["request_rate"] is None else "--request-rate 0.5,1,2"
    single = len(Measured(report["rows"]).loads) == 1
    return (
        (f"One load was measured; several, such as {option}, show how the widths bear more of it.",) if single else ()
    )


def _goodput(report: Report) -> Section:
    settings, met = report["settings"], report["slo_met_up_to"]
    if met is None:
        return Section(
            "Goodput",
            (
                "No goal was given, so no request could miss it; --slo-ttft-ms 200 --slo-tpot-ms 50 would count those "
                "whose first token comes within 200 ms and each further one within 50 ms.",
            ),
        )
    goals = [
        f"{words} within {settings[name]:g} ms"
        for name, words in (("slo_ttft_ms", "the first token"), ("slo_tpot_ms", "each further token, on average,"))
        if settings[name] is not None
    ]
    share = percent(settings["slo_share"])
    rule = f"The goal (SLO) is {' and '.join(goals)}; a request that fails misses it. A load is met if {share} meet it."
    highest = load_text(report["rows"][-1])
    rows = tuple(
        (width_name(row["bit_width"]), load_text(row) + (" (the highest measured)" * (load_text(row) == highest)))
        for row in met
    )
    return Section("Goodput", (rule,), tuple(goodput_plots(report)), Table(("width", f"met by {share} up to"), rows))


def _memory(report: Report) -> Section:
    if report["resources"] is None:
        return Section(
            "Memory",
            ("This server's /metrics has no series of AnyBit's, so what its weights and keys take is unknown.",),
        )
    formats = report["resources"]["kv_formats"]
    rows = tuple(
        (
            row["kv_format"],
            byte_size(row["bytes_per_token"]),
            "–" if row["capacity_tokens"] is None else f"{row['capacity_tokens']:,}",
        )
        for row in formats
    )
    table = Table(("KV format", "bytes of a token", "tokens that fit"), rows) if formats else None
    return Section("Memory", plots=tuple(memory_plots(report)), table=table)


def _quality(report: Report) -> Section:
    quality = report["quality"]
    plots: list[LinePlot | BarPlot] = [*quality_plots(report), *live_quality_plots(report)]
    if quality is None:
        sentence = "Perplexity was not measured; --quality-tokens 2048 scores a text at each width."
    elif quality["note"] is not None:
        sentence = f"Perplexity was not measured: {quality['note']}"
    else:
        sentence = (
            f"Perplexity on {quality['tokens']:,} tokens of {quality['text']}, in windows of {quality['context']}, scored "
            "through the same API after the load; lower is better. The speed is the most of any load."
        )
    return Section("Quality", (sentence,), tuple(plots))


def _all_times(report: Report) -> Table:
    columns = ["width", "load", "requests", "failed"]
    columns += [f"{title} {name}" for _, title in _TIMES for name in _PERCENTILES]
    rows = tuple(
        (
            width_name(row["bit_width"]),
            load_text(row),
            str(row["requests"]),
            str(row["requests"] - row["completed"]),
            *(number(row[field][name]) for field, _ in _TIMES for name in _PERCENTILES),
        )
        for row in report["rows"]
    )
    return Table(tuple(columns), rows)


def _settings(report: Report) -> Table:
    """What was sent, by whom to whom; what is None or empty was not given."""
    server = report["server"] if isinstance(report["server"], dict) else {}
    told = {
        f"server: {name}": server.get(name) for name in ("version", "device", "method", "kv_format", "reproducible")
    }
    told |= {"client": report["machine"]} | {f"client: {name}": text for name, text in report["versions"].items()}
    given = {name.replace("_", " "): value for name, value in report["settings"].items()}
    rows = tuple((name, _text(value)) for name, value in (told | given).items() if value not in (None, "", []))
    return Table(("", "value"), rows)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
