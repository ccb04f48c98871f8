"""The manifests: against the schemas of Kubernetes, as written and with what overlays change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.service import LAST_SECONDS
from serving.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FOLDER = DEPLOY / "kubernetes"
VERSIONS = ("1.29", "1.33")
KEYS = ("name", "mountPath", "port", "key")


def load(file: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(file.read_text()) if one]


def merged(old: Any, new: Any) -> Any:
    """A strategic merge as kustomize makes it, of the fields that are used here."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = {**old}
        for name, value in new.items():
            both[name] = merged(old[name], value) if name in old else value
        return {name: value for name, value in both.items() if value is not None}
    if isinstance(old, list) and isinstance(new, list) and isinstance(new[0], dict):
        key = next(key for key in KEYS if key in new[0])
        known = {one[key]: one for one in new}
        kept = [merged(one, known.pop(one[key], one)) for one in old]
        return kept + list(known.values())
    return new


def built(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` gives, but for labels."""
    (plan,) = load(folder / "kustomization.yaml")
    found: list[dict[str, Any]] = []
    for name in plan["resources"]:
        there = folder / name
        found += built(there) if there.is_dir() else load(there)
    return changed(found, folder, plan)


def changed(
    found: list[dict[str, Any]], folder: Path, plan: dict[str, Any]
) -> list[dict[str, Any]]:
    """What patches and components of a plan make of it."""
    for patch in plan.get("patches", []):
        (change,) = load(folder / patch["path"])
        whose = [
            one
            for one in found
            if (one["kind"], one["metadata"]["name"])
            == (change["kind"], change["metadata"]["name"])
        ]
        assert len(whose) == 1, patch
        found[found.index(whose[0])] = merged(whose[0], change)
    for name in plan.get("components", []):
        (inner,) = load(folder / name / "kustomization.yaml")
        for file in inner["resources"]:
            found += load(folder / name / file)
        found = changed(found, folder / name, inner)
    return found


@pytest.fixture(params=["base", "overlays/cpu", "overlays/gpu"])
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return built(FOLDER / request.param)


def one_of(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def pod_of(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = one_of(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.mark.parametrize("version", VERSIONS)
def test_they_fit_the_schemas(objects: list[dict[str, Any]], version: str) -> None:
    assert {"Deployment", "Service", "NetworkPolicy"} <= {one["kind"] for one in objects}
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", [*VERSIONS, "1.37"])
@pytest.mark.parametrize("name", ["job.yaml", "volumes.yaml"])
def test_those_of_the_batch_job_fit_them_too(name: str, version: str) -> None:
    objects = load(DEPLOY / "batch" / name)
    assert objects
    for one in objects:
        kubernetes_validate.validate(one, version, strict=True)


def test_every_file_of_the_folder_is_used() -> None:
    for file in FOLDER.rglob("*.yaml"):
        if file.name != "kustomization.yaml":
            (plan,) = load(file.with_name("kustomization.yaml"))
            named = [*plan.get("resources", []), *(one["path"] for one in plan.get("patches", []))]
            assert file.name in named, file


def test_a_misspelt_field_would_be_found(objects: list[dict[str, Any]]) -> None:
    wrong = copy.deepcopy(one_of(objects, "Deployment"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def test_pods_have_no_rights_that_they_do_not_need(objects: list[dict[str, Any]]) -> None:
    pod, container = pod_of(objects)
    assert pod["automountServiceAccountToken"] is False
    inside = pod["securityContext"]
    assert (inside["runAsNonRoot"], inside["runAsUser"]) == (True, 1034)
    assert inside["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        assert not pod.get(name)
    assert not any("hostPath" in one for one in pod["volumes"])
    assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()


def test_no_variable_of_the_cluster_stops_the_service(objects: list[dict[str, Any]]) -> None:
    """A Service named dermaflux makes DERMAFLUX_SERVICE_HOST, which is no setting."""
    pod, container = pod_of(objects)
    assert pod["enableServiceLinks"] is False
    given = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in given.values())
    settings = Settings.from_environment(given)
    cpus = container["resources"]["requests"]["cpu"]
    assert str(settings.threads) == cpus


def test_files_that_settings_name_are_mounted(objects: list[dict[str, Any]]) -> None:
    pod, container = pod_of(objects)
    settings = Settings.from_environment({one["name"]: one["value"] for one in container["env"]})
    mounts = {Path(one["mountPath"]): one for one in container["volumeMounts"]}
    for file in (settings.keys, settings.tls_cert, settings.tls_key, settings.audit_key):
        if file is None:
            continue
        assert mounts[file.parent]["readOnly"]
    assert {one["name"] for one in mounts.values()} == {one["name"] for one in pod["volumes"]}
    secret = [one["secret"] for one in pod["volumes"] if "secret" in one]
    # Group and owner read; nobody else, and nobody writes.
    assert {one["defaultMode"] for one in secret} == {0o440}
    written = {str(path) for path, one in mounts.items() if not one.get("readOnly")}
    assert {"/tmp", "/var/lib/dermaflux/home"} <= written


def test_probes_are_of_life_but_for_readiness(objects: list[dict[str, Any]]) -> None:
    _, container = pod_of(objects)
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "liveness", "readiness")
    }
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    startup = container["startupProbe"]
    # Hashing a large bundle comes before listening.
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


def test_what_was_begun_is_finished(objects: list[dict[str, Any]]) -> None:
    pod, _ = pod_of(objects)
    longest = Settings().deadline_seconds + LAST_SECONDS
    assert pod["terminationGracePeriodSeconds"] > longest


def test_nothing_goes_out_and_not_everybody_comes_in(objects: list[dict[str, Any]]) -> None:
    policy = one_of(objects, "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    for rule in policy["ingress"]:
        assert rule["from"]
        assert rule["ports"] == [{"port": "https", "protocol": "TCP"}]
    labels = one_of(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        policy["podSelector"]["matchLabels"],
        one_of(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one_of(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one_of(objects, "Service")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()


def test_a_node_can_always_be_drained(objects: list[dict[str, Any]]) -> None:
    assert one_of(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_records_are_kept_by_one_pod_and_sealed_with_a_key_from_elsewhere() -> None:
    for name in ("cpu", "gpu"):
        objects = built(FOLDER / "overlays" / name)
        spec = one_of(objects, "Deployment")["spec"]
        # Two pods cannot hold a volume of one node, nor write one log from two.
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
        pod, container = pod_of(objects)
        given = {one["name"]: one["value"] for one in container["env"]}
        settings = Settings.from_environment(given)
        assert settings.audit is not None
        assert settings.marks is not None
        assert settings.audit_key is not None
        assert settings.audit_required
        claims = [
            one["persistentVolumeClaim"]["claimName"]
            for one in pod["volumes"]
            if "persistentVolumeClaim" in one
        ]
        assert claims == [one_of(objects, "PersistentVolumeClaim")["metadata"]["name"]]
        (place,) = [
            one["mountPath"] for one in container["volumeMounts"] if one["name"] == "records"
        ]
        assert settings.audit.is_relative_to(place)
        assert settings.marks.is_relative_to(place)
        assert not settings.audit_key.is_relative_to(place)


def test_a_gpu_is_asked_for_only_where_there_is_one() -> None:
    for name, wanted in (("cpu", None), ("gpu", "1")):
        _, container = pod_of(built(FOLDER / "overlays" / name))
        assert container["resources"]["limits"].get("nvidia.com/gpu") == wanted
    pod, container = pod_of(built(FOLDER / "overlays/gpu"))
    assert container["image"].endswith("-cuda")
    # The patch adds to what the base has, and takes nothing away.
    _, base = pod_of(built(FOLDER / "base"))
    assert {one["name"] for one in base["env"]} < {one["name"] for one in container["env"]}


def test_the_monitor_asks_for_what_the_service_gives() -> None:
    (monitor,) = load(FOLDER / "components/monitoring/monitor.yaml")
    (service,) = load(FOLDER / "base/service.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [one["name"] for one in service["spec"]["ports"]]
    assert (endpoint["path"], endpoint["scheme"]) == ("/metrics", "https")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
