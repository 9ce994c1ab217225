"""The report of `bench serve` as one HTML file that loads nothing and runs nothing."""

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from anybit.server.bench.report_page.plot import HEIGHT, WIDTH
from anybit.server.bench.report_page.sections import sections

# Told apart without colours too: circle, square, triangles, diamond, plus; around 0, 0.
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-4.8L4.6,3.4H-4.6Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,4.8L4.6,-3.4H-4.6Z",
    "M-1.5,-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
)


def render_page(report: dict[str, Any]) -> str:
    """The report as HTML, whatever the server called its model or said; all of it is escaped."""
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        report=report,
        sections=sections(report),
        style=_read("style.css"),
        markers=_MARKERS,
        width=WIDTH,
        height=HEIGHT,
    )


def _read(name: str) -> str:
    return (resources.files("anybit.server.bench.report_page") / name).read_text(encoding="utf-8")
