"""Numbers as people read them."""

import math

_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def number(value: float | None) -> str:
    """Three digits that count, or all before the point; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    # Rounding may add a digit before the point: 9.999 is 10.0.
    decimals = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{decimals}f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def byte_unit(largest: float) -> tuple[float, str]:
    """By what to divide bytes of which none is larger, and what they are then."""
    power = min(len(_BYTE_UNITS) - 1, max(0, math.floor(math.log(max(largest, 1), 1024))))
    return 1024.0**power, _BYTE_UNITS[power]


def byte_size(size: float | None) -> str:
    if size is None:
        return "–"
    divisor, unit = byte_unit(size)
    return f"{size:g} {unit}" if divisor == 1 else f"{number(size / divisor)} {unit}"
