"""The unit of systemd and Podman's: keys that exist, rights that are not needed, times that fit."""

from __future__ import annotations

import re
from pathlib import Path

from serving.scorer import ENVIRONMENT
from serving.service import LAST_SECONDS
from serving.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNIT = DEPLOY / "systemd/dermaflux.service"
QUADLET = DEPLOY / "podman/dermaflux.container"
# podman-systemd.unit(5), of what is used here.
KNOWN = {
    *("Image", "ContainerName", "Pull", "User", "Group", "Environment", "Secret", "ReadOnly"),
    *("Tmpfs", "DropCapability", "NoNewPrivileges", "PidsLimit", "Ulimit", "Network"),
    *("PublishPort", "HealthCmd", "HealthInterval", "HealthTimeout", "HealthRetries"),
    *("HealthStartPeriod", "HealthOnFailure", "PodmanArgs", "Volume"),
}


def sections(file: Path) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in file.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = head[1]
            found[section] = {}
            continue
        name, sign, value = line.partition("=")
        assert sign, line
        found[section].setdefault(name, []).append(value)
    return found


def variables(lines: list[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def test_the_unit_takes_every_right_away_that_is_not_needed() -> None:
    service = sections(UNIT)["Service"]
    yes = (
        *("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectClock"),
        *("ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "PrivateUsers"),
        *("ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces"),
        *("RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "RemoveIPC"),
    )
    for name in yes:
        assert service[name] == ["yes"], name
    assert service["CapabilityBoundingSet"] == [""]
    assert service["ProtectSystem"] == ["strict"]
    assert service["ProtectProc"] == ["invisible"]
    assert service["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert service["UMask"] == ["0077"]
    assert service["User"] == ["dermaflux"]
    assert "1034" in (DEPLOY / "systemd/dermaflux.sysusers").read_text()


def test_the_unit_lets_no_packet_out() -> None:
    service = sections(UNIT)["Service"]
    assert service["IPAddressDeny"] == ["any"]
    assert service["IPAddressAllow"] == ["localhost"]
    assert set(service["RestrictAddressFamilies"][0].split()) == {"AF_UNIX", "AF_INET", "AF_INET6"}
    given = variables(service["Environment"])
    assert given["LISTEN"] == "127.0.0.1"
    assert given["BENTOML_DO_NOT_TRACK"] == "true"
    for one in ENVIRONMENT:
        assert given[one["name"]] == one["value"]
    Settings.from_environment(given)


def test_the_unit_writes_only_where_it_may() -> None:
    service = sections(UNIT)["Service"]
    given = variables(service["Environment"])
    assert service["RuntimeDirectory"] == ["dermaflux"]
    for name in ("BENTOML_HOME", "HOME"):
        assert given[name].startswith("/run/dermaflux")
    assert not service.keys() & {"ReadWritePaths", "ExecStartPre"}


def test_examples_in_the_environment_are_settings() -> None:
    lines = (DEPLOY / "systemd/environment").read_text().splitlines()
    pairs = [line.lstrip("#") for line in lines if re.match(r"#?[A-Z_]+=", line)]
    assert len(pairs) >= 5
    Settings.from_environment(dict(pair.split("=", 1) for pair in pairs))


def test_what_was_begun_is_finished() -> None:
    longest = Settings().deadline_seconds + LAST_SECONDS
    service = sections(UNIT)["Service"]
    assert float(service["TimeoutStopSec"][0]) > longest
    # The first process tells the others, after what they do.
    assert service["KillMode"] == ["mixed"]
    quadlet = sections(QUADLET)
    stop = re.search(r"--stop-timeout=(\d+)", quadlet["Container"]["PodmanArgs"][0])
    assert stop is not None
    assert longest < float(stop[1]) < float(quadlet["Service"]["TimeoutStopSec"][0])


def test_the_container_of_podman_is_confined() -> None:
    container = sections(QUADLET)["Container"]
    assert container.keys() <= KNOWN
    assert container["User"] == ["1034"]
    assert container["ReadOnly"] == ["true"]
    assert container["DropCapability"] == ["ALL"]
    assert container["NoNewPrivileges"] == ["true"]
    assert container["Network"] == ["dermaflux.network"]
    assert (DEPLOY / "podman" / container["Network"][0]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in container["PublishPort"])
    settings = Settings.from_environment(variables(container["Environment"]))
    secrets = {line.split(",")[0] for line in container["Secret"]}
    (records,) = [line.split(":")[1] for line in container["Volume"]]
    for folder in (settings.audit, settings.marks):
        assert folder is not None
        assert folder.is_relative_to(records)
    for file in (settings.keys, settings.tls_cert, settings.tls_key, settings.audit_key):
        assert file is not None
        assert file.name in secrets
    assert all("mode=0400" in line and "uid=1034" in line for line in container["Secret"])


def test_health_is_asked_of_what_is_in_the_image() -> None:
    container = sections(QUADLET)["Container"]
    assert container["HealthCmd"] == ["python /opt/dermaflux/probe.py /livez"]
    assert "deploy/probe.py" in (DEPLOY / "Dockerfile").read_text()
