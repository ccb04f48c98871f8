"""Dashboard, alerts and compose file: of metrics that there are, with labels that they can have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry

from serving.app import ROUTES
from serving.gpu import _FIGURES
from serving.metrics import Metrics, Outcome, Stage
from serving.schema import Classification
from serving.service import LAST_SECONDS
from serving.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MONITORING = DEPLOY / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dermaflux.json").read_text())
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OF_OTHERS = {
    "up",  # Prometheus itself
    # BentoML's, as tests/serving/test_service.py reads it of a running service.
    "bentoml_service_adaptive_batch_size_sum",
    "bentoml_service_adaptive_batch_size_count",
}
WORDS = {
    *("sum", "rate", "increase", "by", "histogram_quantile", "scalar", "abs", "unless", "and"),
    *("instance", "route", "status", "stage", "le", "outcome", "decision", "label_values", "job"),
}


def samples() -> set[str]:
    """Names of all that `/metrics` can tell of ours."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.request("/v1/model", 200)
    metrics.step(1, 2, 1)
    metrics.generation("done")
    metrics.batch(1)
    metrics.decision("benign")
    metrics.queue(0, 0)
    found = {one.name for metric in registry.collect() for one in metric.samples}
    return found | {f"dermaflux_gpu_{name}" for name in _FIGURES}


def expressions() -> list[str]:
    panels = [target["expr"] for one in DASHBOARD["panels"] for target in one.get("targets", [])]
    asked = [
        one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"
    ]
    return [*panels, *asked, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("expression", expressions())
def test_metrics_and_labels_are_there(expression: str) -> None:
    bare = re.sub(r'"[^"]*"|\$__\w+|\[[^\]]*\]', "", expression)
    names = set(re.findall(r"[a-z_]{2,}", bare)) - WORDS
    assert names, "a panel of nothing"
    assert names <= samples() | OF_OTHERS
    labels = {
        "route": {*ROUTES, "other"},
        "stage": {*get_args(Stage)},
        "outcome": {*get_args(Outcome)},
        "decision": {*get_args(Classification.model_fields["decision"].annotation)},
        "status": {"200", "401", "429", "500", "503"},
        "job": {"dermaflux"},
        "instance": {"$instance"},
    }
    for label, sign, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', expression):
        assert label in labels, label
        for one in value.split("|") if "~" in sign else [value]:
            known = labels[label]
            assert one in known or any(re.fullmatch(one, other) for other in known), (label, one)


def test_a_metric_that_is_not_there_would_be_found() -> None:
    with pytest.raises(AssertionError):
        test_metrics_and_labels_are_there("rate(dermaflux_request_total[5m])")
    with pytest.raises(AssertionError):
        test_metrics_and_labels_are_there('rate(dermaflux_requests_total{route="/nowhere"}[5m])')


def test_the_dashboard_is_whole() -> None:
    ids = [one["id"] for one in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = set()
    for one in DASHBOARD["panels"]:
        at = one["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & places, f"{one['title']} lies over another"
        places |= cells
    source = yaml.safe_load((MONITORING / "grafana/datasource.yml").read_text())["datasources"][0]
    chosen = DASHBOARD["templating"]["list"][0]["current"]["value"]
    assert chosen == source["uid"]


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "action"} <= rule["annotations"].keys()


def test_every_container_is_confined() -> None:
    for name, one in COMPOSE["services"].items():
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert int(one["user"].split(":")[0]) > 0
        assert not one.keys() & {"network_mode", "privileged", "devices", "pid", "ipc", "cap_add"}
        assert "docker.sock" not in json.dumps(one)
        # Reached from the machine itself, until somebody decides otherwise.
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
        assert one["mem_limit"]
        assert one["pids_limit"]


def test_compose_names_what_there_is() -> None:
    for name, one in COMPOSE["services"].items():
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
                assert volume.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
        assert set(one["secrets"]) <= COMPOSE["secrets"].keys(), name
        assert set(one["networks"]) <= COMPOSE["networks"].keys()
    asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
    given = re.findall(r"^(\w+)=", (DEPLOY / "environment.example").read_text(), re.MULTILINE)
    assert asked == set(given)
    for one in COMPOSE["secrets"].values():
        assert one["file"].startswith("./secrets/")
    assert "secrets/" in (DEPLOY / ".gitignore").read_text().split()


def test_compose_gives_the_service_what_it_needs() -> None:
    service = COMPOSE["services"]["dermaflux"]
    variables: dict[str, Any] = service["environment"]
    settings = Settings.from_environment(variables)
    for file in (settings.keys, settings.tls_cert, settings.tls_key, settings.audit_key):
        assert file is not None
        assert file.parent == Path("/run/secrets")
        assert file.name in service["secrets"]
    assert variables["BENTOML_DO_NOT_TRACK"] == "true"
    (records,) = [one.split(":")[1] for one in service["volumes"]]
    for folder in (settings.audit, settings.marks):
        assert folder is not None
        assert folder.is_relative_to(records)
    # The group that may write into what the image has there.
    assert service["user"] == "1034:0"
    written = [one.split(":")[0] for one in service["tmpfs"]]
    assert written == ["/tmp", "/var/lib/dermaflux/home"]
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace > Settings().deadline_seconds + LAST_SECONDS


def test_prometheus_reaches_no_further_than_the_service() -> None:
    assert COMPOSE["services"]["prometheus"]["networks"] == ["watch"]
    assert COMPOSE["networks"]["watch"] == {"internal": True}
    plan = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = plan["scrape_configs"]
    assert job["job_name"] == "dermaflux"
    assert ROUTES[job["metrics_path"]] == ("GET", "admin")
    assert job["scheme"] == "https"
    secrets = {f"/run/secrets/{name}" for name in COMPOSE["services"]["prometheus"]["secrets"]}
    assert {job["authorization"]["credentials_file"], job["tls_config"]["ca_file"]} == secrets
    (target,) = job["static_configs"][0]["targets"]
    assert target.split(":")[0] in COMPOSE["services"]


def test_no_address_of_a_registry_is_named() -> None:
    for file in [*DEPLOY.rglob("*")]:
        if file.is_file() and file.suffix != ".json" and "secrets" not in file.parts:
            text = file.read_text()
            assert not re.search(r"\b(docker\.io|quay\.io|ghcr\.io|gcr\.io|pypi\.org)\b", text), (
                file
            )
