"""Writes the dashboards that Grafana reads from their descriptions here.

python deploy/grafana/build_dashboards.py
"""

import json
from pathlib import Path

import bit_widths
import kv_cache
import serving

DASHBOARDS = {"serving": serving.DASHBOARD, "bit-widths": bit_widths.DASHBOARD, "kv-cache": kv_cache.DASHBOARD}
DIRECTORY = Path(__file__).parent / "dashboards"


def rendered() -> dict[Path, str]:
    """The text of each file."""
    return {
        DIRECTORY / f"{name}.json": json.dumps(dashboard.to_json(), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for path, text in rendered().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
