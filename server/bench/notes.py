"""What a reader of a report must know to trust its numbers, in sentences."""

from collections.abc import Iterator
from typing import Any

from anybit.server.bench.report import load_text

# Beyond this share of one core, chunks may wait for this process instead of the server.
_BUSY_CLIENT_SHARE = 0.8


def notes(report: dict[str, Any]) -> Iterator[str]:
    """What failed and why, what was left out, and where the client or the settings were the limit."""
    rows, settings = report["rows"], report["settings"]
    several_loads = len({load_text(row) for row in rows}) > 1
    for row in rows:
        label = "Default width" if row["bit_width"] is None else f"{row['bit_width']} bits"
        where = f"{label}, {load_text(row)}" if several_loads else label
        for kind, message in row["messages"].items():
            yield f"{where}: {row['failed'][kind]} failed ({kind}): {message}"
    for name in settings["refused_fields"]:
        yield f"The server refused the field {name}; it was left out."
    asked = max((row["concurrency"] or 0 for row in rows), default=0)
    if asked > settings["requests"]:
        yield (
            f"A round has {settings['requests']} requests, so no more than that were in flight; "
            f"--requests {asked} is the least for {asked} at a time."
        )
    busiest = max(row["client_cpu_share"] for row in rows)
    if busiest > _BUSY_CLIENT_SHARE:
        yield f"This client was busy {busiest:.0%} of the time; the numbers may be its own and not the server's."
