"""Axes and geometry of the report's plots."""

import itertools
import math
import random

import pytest

from anybit.server.bench.load import Load
from anybit.server.bench.report_page.axis import load_axis, value_axis
from anybit.server.bench.report_page.number_text import byte_size, number, percent
from anybit.server.bench.report_page.plot import HEIGHT, WIDTH, Bar, BarPlot, LinePlot, Point, Series, Table

EMPTY = Table((), ())


def line_plot(*series: Series, **fields: object) -> LinePlot:
    points = [point for line in series for point in line.points if point is not None]
    x = value_axis("x", [point.x for point in points])
    y = value_axis("y", [point.y for point in points])
    return LinePlot("key", "title", "summary", x, y, series, EMPTY, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_axis_holds_its_values_with_a_few_round_marks(seed: int, from_zero: bool) -> None:
    generator = random.Random(seed)
    scale = 10.0 ** generator.randint(-4, 9)
    values = [generator.uniform(0.01, 1) * scale for _ in range(generator.randint(1, 8))]
    axis = value_axis("", values, from_zero)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    labels = [label for _, label in axis.marks]
    assert 2 <= len(labels) == len(set(labels)) <= 8
    assert axis.is_log == (max(values) / min(values) > 30)
    if from_zero and not axis.is_log:
        assert axis.low == 0


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [5.0], [0.0, 1e9], [1e-5, 1e300]])
def test_axis_stands_whatever_was_measured(values: list[float]) -> None:
    for from_zero in (True, False):
        axis = value_axis("", values, from_zero)
        assert axis.high > axis.low
        assert all(math.isfinite(axis.share(value)) for value in values)
        assert len(axis.marks) <= 8


def test_axis_of_values_with_a_zero_is_linear() -> None:
    assert not value_axis("", [0.0, 0.01, 100.0]).is_log


def test_marks_have_the_decimals_of_their_step() -> None:
    assert [label for _, label in value_axis("", [0.9]).marks] == ["0.0", "0.5", "1.0"]
    assert [label for _, label in value_axis("", [3000.0]).marks] == ["0", "1,000", "2,000", "3,000"]
    assert [label for _, label in value_axis("", [0.1, 1e6]).marks] == ["0.1", "10", "1,000", "100,000", "1e7"]


def test_loads_lie_at_their_logarithms_and_all_at_once_behind_them() -> None:
    loads = [Load("request_rate", rate) for rate in (0.5, 1.0, 4.0, math.inf)]
    axis, places = load_axis(loads)
    assert [axis.share(places[load]) for load in loads] == [0.0, 0.25, 0.75, 1.0]
    assert [label for _, label in axis.marks] == ["0.5", "1", "4", "all at once"]
    assert axis.title == "requests per second"


@pytest.mark.parametrize("load", [Load("concurrency", 8), Load("request_rate", math.inf)])
def test_one_load_lies_in_the_middle(load: Load) -> None:
    axis, places = load_axis([load])
    assert axis.share(places[load]) == 0.5


def test_labels_of_close_marks_are_left_out_but_never_the_last() -> None:
    loads = [Load("request_rate", rate) for rate in (*range(1, 40), math.inf)]
    axis, places = load_axis(loads)
    points = tuple(Point(places[load], 1, "") for load in loads)
    plot = LinePlot("key", "", "", axis, value_axis("", [1]), (Series("a", 0, points),), EMPTY)
    assert len(plot.x_ticks) == 40
    shown = [tick for tick in plot.x_ticks if tick.text]
    assert [shown[0].text, shown[-1].text] == ["1", "all at once"]
    for before, after in itertools.pairwise(shown):
        assert after.x - before.x >= 6 * (len(before.text) + len(after.text)) / 2


@pytest.mark.parametrize("heights", [[0, 0, 0, 0, 0], [9, 9, 9, 9, 9], [0, 0.1, 5, 8.9, 9], [4, 4.1, 4.2, 9, 9]])
def test_names_do_not_cover_each_other_and_stay_inside(heights: list[float]) -> None:
    series = [Series(f"{i} bits", i, (Point(0, 1, ""), Point(9, height, ""))) for i, height in enumerate(heights)]
    labels = sorted(line_plot(*series).labels, key=lambda label: label.y)
    assert len(labels) == len(heights)
    assert all(0 <= label.y <= HEIGHT - 40 for label in labels)
    for upper, lower in itertools.pairwise(labels):
        assert lower.y - upper.y >= 13.9


def test_names_side_by_side_keep_their_heights() -> None:
    plot = line_plot(Series("a", 0, (Point(0, 5, ""),)), Series("b", 1, (Point(9, 5, ""),)))
    assert [label.y for label in plot.labels] == [marker.y for marker in plot.markers]


def test_a_line_breaks_where_nothing_was_measured() -> None:
    points = (Point(0, 1, ""), Point(1, 2, ""), None, Point(3, 1, ""), Point(4, 2, ""), Point(5, 3, ""))
    plot = line_plot(Series("a", 0, points))
    assert [path.count("L") for _, path in plot.lines] == [1, 2]
    assert len(plot.markers) == 5
    assert plot.joining_line == ""


def test_all_marks_lie_on_the_drawing() -> None:
    plot = line_plot(Series("a", 0, (Point(0, 0, ""), Point(3, 7, ""))), limit=(3.0, "limit"), is_joined=True)
    assert (plot.markers[0].x, plot.markers[0].y) == (plot.left, plot.bottom)
    assert all(0 < place.x < WIDTH and 0 < place.y < HEIGHT for place in (*plot.markers, *plot.x_ticks, *plot.y_ticks))
    assert plot.limit_line is not None
    assert plot.top < plot.limit_line.y < plot.bottom
    assert line_plot(Series("a", 0, (Point(0, 1, ""),)), limit=(99.0, "")).limit_line is None


def test_bars_are_as_long_as_their_values() -> None:
    plot = BarPlot("key", "", "", (Bar("a", 4, "", 0), Bar("b", 1, "", None), Bar("c", 0, "", 2)), EMPTY)
    lengths = [length for _, _, length in plot.lengths]
    assert lengths[1] == pytest.approx(lengths[0] / 4, abs=0.1)
    assert lengths[2] == 0
    assert plot.height > plot.lengths[-1][1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (math.inf, "–"), (0, "0"), (0.0123, "0.0123"), (0.99951, "1.00"), (9.999, "10.0"), (12.34, "12.3"),
        (123.4, "123"), (1315573.2, "1,315,573"), (1e12, "1.00e+12"), (-2.5, "-2.50"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_that_count(value: float | None, text: str) -> None:
    assert number(value) == text


def test_sizes_and_shares_are_readable() -> None:
    assert [byte_size(size) for size in (None, 0, 67.5, 1023, 1024, 3 << 20, 1.5 * (1 << 40))] == [
        "–", "0 bytes", "67.5 bytes", "1023 bytes", "1.00 KiB", "3.00 MiB", "1.50 TiB",
    ]  # fmt: skip
    assert [percent(share) for share in (None, 0.0, 0.875, 1.0)] == ["–", "0 %", "88 %", "100 %"]
