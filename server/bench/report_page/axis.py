"""The axes of a plot: where a value lies, and which are written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anybit.server.bench.load import Load

# Values further apart than this are told apart on a logarithmic axis only.
_LINEAR_SPREAD = 30.0
_MOST_TICKS = 6


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`, which differ and are above 0 on a logarithmic axis."""

    title: str
    low: float
    high: float
    is_log: bool = False
    marks: tuple[tuple[float, str], ...] = ()  # values and their labels, ascending

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at the beginning, 1 at the end."""
        low, high, place = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return (place - low) / (high - low)


def value_axis(title: str, values: Sequence[float], from_zero: bool = True) -> Axis:
    """Linear, from zero if asked for, unless `values` (not negative) lie orders of magnitude apart and none is zero."""
    if values and min(values) > 0 and max(values) / min(values) > _LINEAR_SPREAD:
        return _logarithmic(title, min(values), max(values))
    highest = max(values, default=0.0) or 1.0
    lowest = 0.0 if from_zero else min(values, default=0.0)
    step = _round_step((highest - lowest or highest) / (_MOST_TICKS - 2))
    first, last = math.floor(lowest / step), math.ceil(highest / step)
    last = max(last, first + 1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = tuple((index * step, f"{index * step:,.{decimals}f}") for index in range(first, last + 1))
    return Axis(title, first * step, last * step, marks=marks)


def load_axis(loads: Sequence[Load]) -> tuple[Axis, dict[Load, float]]:
    """An axis with a mark at each of the ascending loads, and where each lies: at its logarithm, all at once behind it."""
    finite = [load for load in loads if math.isfinite(load.number)]
    places = {load: math.log2(load.number) for load in finite}
    if len(finite) < len(loads):
        places[loads[-1]] = max(places.values(), default=0.0) + 1.0
    low, high = min(places.values()), max(places.values())
    edge = 0.0 if high > low else 1.0  # one load lies in the middle
    names = {load: f"{load.number:g}" if load in finite else "all at once" for load in loads}
    title = "requests in flight" if loads[0].kind == "concurrency" else "requests per second"
    marks = tuple((places[load], names[load]) for load in loads)
    return Axis(title, low - edge, high + edge, marks=marks), places


def _round_step(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _logarithmic(title: str, lowest: float, highest: float) -> Axis:
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    step = max(1, math.ceil((last - first) / (_MOST_TICKS - 1)))
    last = first + step * math.ceil((last - first) / step)
    marks = tuple((10.0**power, _power_text(power)) for power in range(first, last + 1, step))
    return Axis(title, 10.0**first, 10.0**last, is_log=True, marks=marks)


def _power_text(power: int) -> str:
    return f"{10.0**power:g}" if power < 3 else f"{10**power:,}" if power <= 6 else f"1e{power}"
