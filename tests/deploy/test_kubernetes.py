"""The manifests agree with Kubernetes' schemas, with each other and with what the server does."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from anybit.server.config import ServerConfig

DIRECTORY = Path(__file__).parents[2] / "deploy/kubernetes"
OF_THE_OPERATOR = ("ServiceMonitor", "PrometheusRule")


def manifests(folder: str) -> dict[str, dict[str, Any]]:
    """By kind, as kustomize would apply them but for its patches."""
    names = yaml.safe_load((DIRECTORY / folder / "kustomization.yaml").read_text())["resources"]
    found = [yaml.safe_load((DIRECTORY / folder / name).read_text()) for name in names]
    return {manifest["kind"]: manifest for manifest in found}


BASE = manifests("base")
POD = BASE["Deployment"]["spec"]["template"]["spec"]
SERVER = POD["containers"][0]


def test_every_manifest_is_applied() -> None:
    listed = yaml.safe_load((DIRECTORY / "base/kustomization.yaml").read_text())["resources"]
    assert {path.name for path in (DIRECTORY / "base").glob("*.yaml")} == {*listed, "kustomization.yaml"}


@pytest.mark.parametrize("kind", [kind for kind in BASE if kind not in OF_THE_OPERATOR])
def test_manifest_has_the_schema_of_its_kind(kind: str) -> None:
    kubernetes_validate.validate(BASE[kind], "1.31", strict=True)


def test_names_and_labels_meet() -> None:
    labels = BASE["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert BASE["Service"]["spec"]["selector"].items() <= labels.items()
    assert BASE["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert BASE["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert BASE["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == BASE["Deployment"]["metadata"]["name"]
    monitor = BASE["ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= BASE["Service"]["metadata"]["labels"].items()
    assert monitor["spec"]["jobLabel"] in BASE["Service"]["metadata"]["labels"]
    assert monitor["spec"]["endpoints"][0]["port"] == BASE["Service"]["spec"]["ports"][0]["name"]
    claim = BASE["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"persistentVolumeClaim": {"claimName": claim}, "name": "models"} in POD["volumes"]


def test_probes_ask_what_the_server_answers() -> None:
    assert SERVER["readinessProbe"]["httpGet"]["path"] == SERVER["startupProbe"]["httpGet"]["path"] == "/ready"
    assert SERVER["livenessProbe"]["httpGet"]["path"] == "/health"


def test_pod_lives_until_accepted_requests_are_finished(tmp_path: Path) -> None:
    drain_seconds = ServerConfig("name", tmp_path).drain_timeout_seconds
    pause = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > pause + drain_seconds + 5


def test_pod_is_restricted() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert SERVER["securityContext"]["readOnlyRootFilesystem"]
    assert SERVER["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_autoscaler_looks_at_a_metric_that_the_adapter_offers() -> None:
    (metric,) = BASE["HorizontalPodAutoscaler"]["spec"]["metrics"]
    adapter = yaml.safe_load((DIRECTORY / "metrics-adapter.yaml").read_text())
    assert metric["pods"]["metric"]["name"] in {rule["name"]["as"] for rule in adapter["rules"]["custom"]}


def test_rules_are_those_of_prometheus() -> None:
    build_rules = load(DIRECTORY / "build_rules.py")
    assert build_rules.TARGET.read_text() == build_rules.rendered(), "run python deploy/kubernetes/build_rules.py"


def patched(base: Any, patch: Any) -> Any:
    """A strategic merge: fields one by one, containers by their names, other lists as a whole."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: patched(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and all("name" in item for item in patch if isinstance(item, dict)):
        by_name = {item["name"]: item for item in patch if isinstance(item, dict)}
        assert by_name.keys() <= {item["name"] for item in base if isinstance(item, dict)}, "a patch of nothing"
        return [patched(item, by_name.get(item["name"], {})) for item in base] if by_name else patch
    return patch


def check_gpu_deployment(deployment: dict[str, Any]) -> None:
    kubernetes_validate.validate(deployment, "1.31", strict=True)
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["image"] == "anybit:cuda"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert server["livenessProbe"] == SERVER["livenessProbe"]


def test_the_patch_puts_the_server_on_a_gpu() -> None:
    overlay = yaml.safe_load((DIRECTORY / "gpu/kustomization.yaml").read_text())
    assert overlay["resources"] == ["../base"]
    (patch,) = (yaml.safe_load((DIRECTORY / "gpu" / entry["path"]).read_text()) for entry in overlay["patches"])
    check_gpu_deployment(patched(BASE[patch["kind"]], patch))


def test_kustomize_reads_the_same() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")  # Debian's knows no such patches; the test above needs none
    done = subprocess.run([kubectl, "kustomize", DIRECTORY / "gpu"], capture_output=True, text=True, check=True)
    documents = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert set(documents) == set(BASE)
    check_gpu_deployment(documents["Deployment"])


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_service_monitor_has_fields_that_the_operator_knows() -> None:
    """Its schema comes with the operator and not with Kubernetes."""
    monitor = BASE["ServiceMonitor"]
    assert monitor["apiVersion"] == BASE["PrometheusRule"]["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) <= {"endpoints", "jobLabel", "namespaceSelector", "selector", "targetLabels"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert set(endpoint) <= {"authorization", "interval", "path", "port", "scheme", "scrapeTimeout"}
    assert set(endpoint["authorization"]["credentials"]) <= {"key", "name", "optional"}
