"""The queries in Grafana's dashboards, asked of a Prometheus without Grafana."""

import json
import math
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "dashboards"


@dataclass(frozen=True, slots=True)
class Series:
    """Points are (Unix time, value); what is not a number is left out."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class PanelQuery:
    dashboard: str
    panel: dict[str, Any]
    expression: str
    legend: str

    def name(self, labels: dict[str, str]) -> str:
        """What Grafana would call a series."""
        text = self.legend or self.panel["title"]
        for label, value in labels.items():
            text = text.replace("{{" + label + "}}", value)
        return text


def dashboards(directory: Path = DIRECTORY) -> dict[str, dict[str, Any]]:
    """By file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def panel_queries(name: str, dashboard: dict[str, Any], rate_interval: str) -> Iterator[PanelQuery]:
    """All queries of a dashboard, with the variables filled in as for all models."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", rate_interval).replace("$model", ".*")
            yield PanelQuery(name, panel, expression, target["legendFormat"])


@dataclass(frozen=True, slots=True)
class Prometheus:
    """The HTTP API of a server at `url`; every method raises urllib.error.HTTPError for a query that is wrong."""

    url: str

    def query(self, expression: str) -> list[Series]:
        """Values now."""
        found = self._get("query", query=expression)
        if found["resultType"] == "scalar":
            return [_series({}, [found["result"]])]
        return [_series(item["metric"], [item["value"]]) for item in found["result"]]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        found = self._get("query_range", query=expression, start=start, end=end, step=step)
        return [_series(item["metric"], item["values"]) for item in found["result"]]

    def _get(self, route: str, **parameters: Any) -> dict[str, Any]:
        address = f"{self.url.rstrip('/')}/api/v1/{route}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as response:
            return dict(json.load(response)["data"])


def _series(labels: dict[str, str], values: list[tuple[float, str]]) -> Series:
    points = [(float(time), float(value)) for time, value in values]
    return Series(labels, [point for point in points if math.isfinite(point[1])])
