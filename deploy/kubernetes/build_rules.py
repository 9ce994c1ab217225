"""Writes the PrometheusRule from the files that Prometheus itself reads.

python deploy/kubernetes/build_rules.py
"""

from pathlib import Path

import yaml

DIRECTORY = Path(__file__).parent
RULES = [DIRECTORY.parent / "prometheus" / name for name in ("rules.yml", "alerts.yml")]
TARGET = DIRECTORY / "base/prometheusrule.yaml"
_HEAD = "# Made by build_rules.py from deploy/prometheus/rules.yml and alerts.yml.\n"


def rendered() -> str:
    """The text of the manifest."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "anybit", "labels": {"app.kubernetes.io/name": "anybit"}},
        "spec": {"groups": groups},
    }
    return _HEAD + yaml.safe_dump(manifest, sort_keys=False, width=120)


if __name__ == "__main__":
    TARGET.write_text(rendered())
