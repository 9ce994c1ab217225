"""docker-compose 1.29 reads the file, and what it mounts is there and is what the other side looks for."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.programs import require_program

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = DEPLOY / "compose.yaml"


def configured(**environment: str) -> dict[str, Any]:
    program = require_program("docker-compose", "docker-compose")
    done = subprocess.run(
        [program, "-f", COMPOSE, "config"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return dict(yaml.safe_load(done.stdout))


def test_no_key_that_compose_1_29_does_not_know() -> None:
    assert not {"name", "include"} & set(yaml.safe_load(COMPOSE.read_text()))


@pytest.mark.parametrize(("profile", "service"), [("cpu", "server"), ("gpu", "server-gpu")])
def test_profile_chooses_the_server(profile: str, service: str) -> None:
    services = configured(COMPOSE_PROFILES=profile)["services"]
    chosen = {name for name, body in services.items() if profile in body.get("profiles", [profile])}
    assert chosen == {service, "prometheus", "grafana"}
    assert services[service]["networks"]["default"]["aliases"] == ["anybit"]  # whom Prometheus asks
    devices = services[service].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert bool(devices) == (profile == "gpu")


def test_default_profile_is_cpu() -> None:
    assert "COMPOSE_PROFILES=cpu" in (DEPLOY / ".env").read_text().splitlines()


def test_nothing_listens_beyond_this_machine() -> None:
    for body in configured()["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in body["ports"])


def test_server_has_time_to_drain_and_no_more_rights_than_it_needs() -> None:
    server = configured()["services"]["server"]
    assert server["stop_grace_period"] == "45s"
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]


def test_build_targets_are_stages_of_the_dockerfile() -> None:
    stages = {
        line.split(" AS ")[1] for line in (DEPLOY.parent / "Dockerfile").read_text().splitlines() if " AS " in line
    }
    services = configured()["services"]
    assert {services[name]["build"]["target"] for name in ("server", "server-gpu")} <= stages


def test_mounted_files_are_there() -> None:
    for body in yaml.safe_load(COMPOSE.read_text())["services"].values():
        for volume in body.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    services = configured()["services"]
    provisioning = DEPLOY / "grafana/provisioning"
    (datasource,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/anybit.yaml").read_text())["providers"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in services["grafana"]["volumes"]}
    folder = Path(mounts[provider["options"]["path"]])
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / Path(home).name).is_file()


def test_prometheus_scrapes_the_server_with_its_key_file() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["anybit:8000"]}]
    assert (DEPLOY / "prometheus" / job["authorization"]["credentials_file"]).read_text().strip()


@pytest.mark.parametrize("path", sorted((DEPLOY / "grafana/dashboards").glob("*.json")), ids=lambda path: path.stem)
def test_dashboard_is_one_that_grafana_can_place(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "model"}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["targets"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
