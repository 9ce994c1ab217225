"""Prometheus' own tool reads what is shipped, and each alert fires when it should."""

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.fixtures.programs import require_program

DIRECTORY = Path(__file__).parents[2] / "deploy/prometheus"
FIRING = Path(__file__).with_name("alerts_firing.yml")


def promtool(*arguments: str | Path) -> str:
    program = require_program("promtool", "prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_rules_are_clean(name: str) -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", DIRECTORY / name)


def test_configuration_is_clean() -> None:
    assert "SUCCESS" in promtool("check", "config", "--lint=all", "--lint-fatal", DIRECTORY / "prometheus.yml")


def test_alerts_fire_for_a_server_in_trouble() -> None:
    assert "SUCCESS" in promtool("test", "rules", FIRING)


def test_every_alert_is_among_those_that_fire() -> None:
    groups = yaml.safe_load((DIRECTORY / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    cases = yaml.safe_load(FIRING.read_text())["tests"]
    assert alerts == {
        case["alertname"] for test in cases for case in test.get("alert_rule_test", ()) if case["exp_alerts"]
    }
