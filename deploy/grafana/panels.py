"""Panels and dashboards as values, and the JSON that Grafana reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
_HEADER_HEIGHT = 1


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and how its series are called. `$model` and `$__rate_interval` are filled in by whoever asks."""

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A title, queries and a unit of Grafana's; `kind` is timeseries, stat, bargauge or table.

    All kinds but timeseries show the newest values.
    """

    title: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    description: str = ""
    width: int = 8
    height: int = 8
    stacked: bool = False
    maximum: float | None = None
    no_value: str = ""  # shown where there is no series

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        defaults: dict[str, Any] = {"unit": self.unit, "min": 0}
        if self.maximum is not None:
            defaults["max"] = self.maximum
        if self.no_value:
            defaults["noValue"] = self.no_value
        custom = {"fillOpacity": 25 if self.stacked else 8, "showPoints": "never"}
        custom["stacking"] = {"mode": "normal" if self.stacked else "none"}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {
                "defaults": {**defaults, "custom": custom if self._is_over_time else {}},
                "overrides": [],
            },
            "options": self._options,
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": DATASOURCE,
                    "expr": query.expression,
                    "legendFormat": query.legend,
                    "instant": not self._is_over_time,
                    "range": self._is_over_time,
                    "format": "table" if self.kind == "table" else "time_series",
                }
                for index, query in enumerate(self.queries)
            ],
        }

    @property
    def _is_over_time(self) -> bool:
        return self.kind == "timeseries"

    @property
    def _options(self) -> dict[str, Any]:
        newest = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        match self.kind:
            case "timeseries":
                legend = {"displayMode": "list", "placement": "bottom"}
                return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
            case "stat":
                return {"reduceOptions": newest, "colorMode": "value", "graphMode": "none"}
            case "bargauge":
                return {"reduceOptions": newest, "orientation": "horizontal", "displayMode": "basic"}
            case _:
                return {"showHeader": True}


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side, or below each other once a line is full, under a headline."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    links: Sequence[str] = field(default=("anybit",))  # dashboards with these tags

    def to_json(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["anybit"],
            "schemaVersion": 39,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "links": [{"type": "dashboards", "title": "AnyBit", "tags": list(self.links), "asDropdown": False}],
            "templating": {"list": _VARIABLES},
            "panels": list(self._placed()),
        }

    def _placed(self) -> Sequence[dict[str, Any]]:
        placed: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            position = {"x": 0, "y": y, "w": COLUMNS, "h": _HEADER_HEIGHT}
            placed.append(
                {"id": len(placed) + 1, "type": "row", "title": row.title, "collapsed": False, "gridPos": position}
            )
            y += _HEADER_HEIGHT
            x = tallest = 0
            for panel in row.panels:
                if x + panel.width > COLUMNS:
                    x, y, tallest = 0, y + tallest, 0
                placed.append(panel.to_json(len(placed) + 1, x, y))
                x += panel.width
                tallest = max(tallest, panel.height)
            y += tallest
        return placed


_VARIABLES: list[dict[str, Any]] = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
    {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(anybit_ready, model)", "refId": "model"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    },
]
