"""Plots as geometry: what lies where in the units of their drawing, from which the template makes SVG."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from anybit.server.bench.report_page.axis import Axis

WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 68, 14, 44
_LABEL_HEIGHT = 14.0
_LABEL_WIDTH = 60.0
_LABEL_GAP = 14.0
_CHARACTER_WIDTH = 6.5
_BAR_HEIGHT, _BAR_LEFT, _BAR_RIGHT = 26, 116, 76


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a plot; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    text: str  # shown by a pointer that rests on it


@dataclass(frozen=True, slots=True)
class Series:
    """One width; None is a place without a measurement, at which the line breaks."""

    name: str
    tone: int
    points: tuple[Point | None, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A point in the units of the drawing."""

    x: float
    y: float
    tone: int
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    """A name, its left end, and the point that it belongs to."""

    text: str
    x: float
    y: float
    point: Placed


@dataclass(frozen=True, slots=True)
class LinePlot:
    """One line per width over a common axis. `limit` is a height to stay below (or above), with its name."""

    key: str  # unique on the page
    title: str
    summary: str  # what a reader who cannot see the plot should know
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    table: Table
    limit: tuple[float, str] | None = None
    is_joined: bool = False  # a faint line through the series, of which each is one point

    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM

    @property
    def x_ticks(self) -> list[Placed]:
        """Labels that would touch the one behind them are left out; the last one stays."""
        ticks: list[Placed] = []
        free = math.inf  # where the label behind begins
        for value, label in reversed(self.x.marks):
            across, half = self._across(self.x.share(value)), _CHARACTER_WIDTH * (len(label) + 1) / 2
            is_free = across + half <= free
            free = across - half if is_free else free
            ticks.append(Placed(across, self.bottom, 0, label if is_free else ""))
        return ticks[::-1]

    @property
    def y_ticks(self) -> list[Placed]:
        return [Placed(self.left, self._down(self.y.share(value)), 0, label) for value, label in self.y.marks]

    @property
    def limit_line(self) -> Placed | None:
        """Where the limit lies, None if that is outside."""
        if self.limit is None or not self.y.low <= self.limit[0] <= self.y.high:
            return None
        return Placed(self.left, self._down(self.y.share(self.limit[0])), 0, self.limit[1])

    @property
    def lines(self) -> Iterator[tuple[int, str]]:
        """Tone and path of each piece of a line that has no gap."""
        for series in self.series:
            for piece in _pieces(series.points):
                yield series.tone, _path([self._place(point, series.tone) for point in piece])

    @property
    def joining_line(self) -> str:
        points = [self._place(p, series.tone) for series in self.series for p in series.points if p is not None]
        return _path(points) if self.is_joined else ""

    @property
    def markers(self) -> list[Placed]:
        return [self._place(p, series.tone) for series in self.series for p in series.points if p is not None]

    @property
    def labels(self) -> list[Label]:
        """The names of the series beside their last points, moved up or down where they would cover each other."""
        ends = [(series, [point for point in series.points if point is not None]) for series in self.series]
        places = [(series.name, self._place(points[-1], series.tone)) for series, points in ends if points]
        labels = [Label(name, place.x + _LABEL_GAP, place.y, place) for name, place in places]
        return _spread(labels, self.top, self.bottom)

    def _place(self, point: Point, tone: int) -> Placed:
        return Placed(self._across(self.x.share(point.x)), self._down(self.y.share(point.y)), tone, point.text)

    def _across(self, share: float) -> float:
        return round(self.left + share * (self.right - self.left), 1)

    def _down(self, share: float) -> float:
        return round(self.bottom - share * (self.bottom - self.top), 1)


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    value: float
    text: str
    tone: int | None  # None belongs to no width


@dataclass(frozen=True, slots=True)
class BarPlot:
    """Horizontal bars from zero, with their values at their ends."""

    key: str
    title: str
    summary: str
    bars: tuple[Bar, ...]
    table: Table

    left, bar_height = _BAR_LEFT, _BAR_HEIGHT

    @property
    def height(self) -> int:
        return _BAR_HEIGHT * len(self.bars) + 8

    @property
    def lengths(self) -> list[tuple[Bar, float, float]]:
        """Bars with their upper edge and their length."""
        most = max((bar.value for bar in self.bars), default=0.0) or 1.0
        full = WIDTH - _BAR_LEFT - _BAR_RIGHT
        return [
            (bar, 4.0 + _BAR_HEIGHT * index, round(full * bar.value / most, 1)) for index, bar in enumerate(self.bars)
        ]


def _pieces(points: Sequence[Point | None]) -> Iterator[list[Point]]:
    piece: list[Point] = []
    for point in (*points, None):
        if point is not None:
            piece.append(point)
        elif piece:
            yield piece
            piece = []


def _path(places: Sequence[Placed]) -> str:
    return "M" + "L".join(f"{place.x:g},{place.y:g}" for place in places) if len(places) > 1 else ""


def _spread(labels: Sequence[Label], top: float, bottom: float) -> list[Label]:
    """Labels side by side keep their heights; those above one another are pushed down, and from the edge up again."""
    spread: list[Label] = []
    for label in sorted(labels, key=lambda label: label.y):
        above = [other.y for other in spread if abs(other.x - label.x) < _LABEL_WIDTH]
        spread.append(replace(label, y=max([label.y, top, *(height + _LABEL_HEIGHT for height in above)])))
    raised: list[Label] = []
    for label in reversed(spread):
        below = [other.y for other in raised if abs(other.x - label.x) < _LABEL_WIDTH]
        y = min([label.y, bottom, *(height - _LABEL_HEIGHT for height in below)])
        raised.append(replace(label, y=round(y, 1)))
    return raised[::-1]
