"""The service's doctor: what is wrong with a site is found, named, and comes with what mends it."""

from __future__ import annotations

import json
import os
import socket
from collections import namedtuple
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from dermaflux.bundle import Bundle
from dermaflux.marks.keys import Keys
from serving.audit.ending import files_of
from serving.audit.log import AuditLog, Rules
from serving.audit.record import Event
from serving.audit.secret import add
from serving.doctor import machine
from serving.doctor.__main__ import main
from serving.doctor.report import report
from serving.keys import made
from serving.settings import Settings
from tests.tiny_bundle import write_bundle

NOW = datetime(2026, 6, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Site(Settings):
    """Settings with those that the licence gate, the audit log and signatures have."""

    policy: str | None = None
    classifier: bool = True
    audit: Path | None = None
    audit_key: Path | None = None
    marks: Path | None = None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("doctor") / "bundle"))


@pytest.fixture
def look(bundle, tmp_path):
    """The findings about one thing, with some settings."""
    room = {"BENTOML_HOME": str(tmp_path / "bentoml")}

    def looked(about: str, now: datetime = NOW, environment=None, addresses=(), **settings):
        variables = room if environment is None else environment
        site = Site(**settings)
        found = report(
            site, bundle, core=False, environment=variables, now=now, addresses=addresses
        )
        return [(one.state, one.words, one.mend) for one in found.findings if one.about == about]

    return looked


def key_file(path: Path, **entries) -> Path:
    """A file of keys: name -> (roles, days, created)."""
    lines = []
    for name, (roles, days) in entries.items():
        _, entry = made(name, roles)
        ends = None if days is None else NOW + timedelta(days=days)
        lines.append(entry.model_copy(update={"expires": ends}).model_dump_json(exclude_none=True))
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


def certificate(folder: Path, days: float = 365, begin: float = -1, bits: int = 0):
    """A self-signed certificate and its key, as PEM files."""
    key = rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ward.example")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
        .public_key(key.public_key()).not_valid_before(NOW + timedelta(days=begin))
        .not_valid_after(NOW + timedelta(days=days)).sign(key, hashes.SHA256())
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "tls.key").write_bytes(secret)
    (folder / "tls.key").chmod(0o600)
    return {"tls_cert": folder / "tls.crt", "tls_key": folder / "tls.key"}


def test_a_fresh_machine_is_healthy_and_told_what_it_lacks(bundle, tmp_path):
    found = report(Settings(), bundle, environment={"BENTOML_HOME": str(tmp_path)}, now=NOW)
    assert found.healthy
    assert found.core is not None
    assert found.id == bundle.id
    about = {one.about for one in found.findings}
    assert {"files", "memory", "policy", "keys", "tls", "audit", "disk", "clock"} <= about
    assert found.counts()["fail"] == 0
    plain = json.loads(json.dumps(found.as_json()))
    assert plain["healthy"] is True
    assert plain["core"]["healthy"] is True
    assert len(str(found).splitlines()) == len(found.findings)


def test_what_is_no_bundle_is_a_finding(tmp_path):
    for core in (True, False):
        found = report(Settings(), tmp_path / "absent", core=core, now=NOW)
        assert not found.healthy
        assert [f.state for f in found.findings if f.about == "bundle"] == ["fail"]


def test_a_policy_that_is_not_there_is_told_without_a_bundle_too(tmp_path):
    found = report(Settings(policy="hospital.yaml"), tmp_path / "none", core=False, environment={})
    (one,) = [one for one in found.findings if one.about == "policy"]
    assert (one.state, "hospital.yaml is no policy" in one.words) == ("fail", True)
    assert one.mend.startswith("set DERMAFLUX_POLICY")


def test_licences_under_the_policy(look, bundle):
    assert look("policy")[0][0] == "ok"
    assert look("policy", policy="comercial")[0][0] == "fail"
    bundle.provenance["ingredients"].append(
        {"name": "HAM", "licence": "CC-BY-NC-4.0", "used_for": "classifier"}
    )
    try:
        ((state, words, mend),) = look("policy", policy="commercial")
        assert state == "fail"
        assert "HAM (CC-BY-NC-4.0, classifier) forbids commercial use" in words
        assert "leave the classifier out" in mend
        assert look("policy", policy="commercial", classifier=False)[0][0] == "ok"
        assert look("policy", policy="research")[0][0] == "ok"
    finally:
        bundle.provenance["ingredients"].clear()


def test_keys(look, tmp_path):
    assert "its own machine alone" in look("keys")[0][1]
    assert "whoever reaches" in look("keys", open=True)[0][1]
    good = key_file(tmp_path / "good", a=(["admin"], None), b=(["classify"], 90))
    assert [state for state, _, _ in look("keys", keys=good)] == ["ok"]
    good.chmod(0o640)
    assert [state for state, _, _ in look("keys", keys=good)] == ["ok"]
    good.chmod(0o644)
    assert look("keys", keys=good)[0] == (
        "note", f"{good} may be read by others (mode 0644)", f"chmod 600 {good}"
    )  # fmt: skip
    good.chmod(0o666)
    assert look("keys", keys=good)[0][0] == "fail"

    soon = key_file(tmp_path / "soon", a=(["admin"], 12), b=(["classify"], -1))
    state, words, mend = look("keys", keys=soon)[0]
    assert (state, words) == ("note", "the key a expires in 12 days")
    assert "--id a --roles admin" in mend
    assert "1 of 2 are valid" in look("keys", keys=soon)[-1][1]
    over = key_file(tmp_path / "over", b=(["classify"], -1))
    assert look("keys", keys=over)[-1][:2] == ("fail", "no key is valid any more")
    alone = key_file(tmp_path / "alone", b=(["classify"], None))
    assert "nobody has the role admin" in look("keys", keys=alone)[0][1]
    over.write_text("nonsense")
    assert look("keys", keys=over)[-1][0] == "fail"
    assert look("keys", keys=tmp_path / "absent")[-1][0] == "fail"


def test_certificates(look, tmp_path):
    assert look("tls")[0][0] == "note"
    good = certificate(tmp_path / "good")
    ((state, words, _),) = look("tls", **good)
    assert state == "ok"
    assert "CN=ward.example: valid to 2027-06-01" in words
    assert look("tls", **certificate(tmp_path / "soon", days=9))[0][0] == "note"
    state, words, mend = look("tls", **certificate(tmp_path / "over", days=-0.5))[0]
    assert state == "fail"
    assert "which is over" in words
    assert "put a new certificate" in mend
    assert "to come" in look("tls", **certificate(tmp_path / "later", begin=1))[0][1]
    other = certificate(tmp_path / "other")
    assert look("tls", **{**good, "tls_key": other["tls_key"]})[0][0] == "fail"
    assert look("tls", tls_cert=good["tls_cert"])[0][0] == "fail"
    good["tls_key"].chmod(0o644)
    assert look("tls", **good)[0][2] == f"chmod 600 {good['tls_key']}"
    weak = certificate(tmp_path / "weak", bits=1024)
    assert any("RSA of 1024 bits is weak" in words for _, words, _ in look("tls", **weak)) or (
        look("tls", **weak)[0][0] == "fail"  # some builds of OpenSSL take no such key at all
    )


def test_keys_that_sign_and_seal(look, tmp_path):
    place = tmp_path / "marks"
    assert look("marks") == []
    assert "made at the first start" in look("marks", marks=place)[0][1]
    Keys.open(place / "keys")
    today = datetime.now(UTC)
    assert [state for state, _, _ in look("marks", today, marks=place)] == ["ok"]
    assert look("marks", today + timedelta(days=36_500), marks=place)[0][0] == "fail"
    file = place / "keys/key.pem"
    file.chmod(0o644)
    assert look("marks", today, marks=place)[-1][0] == "note"
    assert look("marks", today, marks=place)[-1][2] == f"chmod 600 {file}"
    file.unlink()
    assert look("marks", today, marks=place)[0][2].startswith(f"ls -l {place / 'keys'}")

    seal = tmp_path / "audit.key"
    assert look("audit key", audit_key=seal) == []
    add(seal)
    assert look("audit key", audit_key=seal)[0][0] == "ok"
    seal.chmod(0o604)
    assert look("audit key", audit_key=seal)[0][2] == f"chmod 600 {seal}"


def test_the_audit_log(look, tmp_path):
    assert look("audit")[0][1] == "there is no audit log"
    folder, key = tmp_path / "audit", tmp_path / "audit.key"
    site = {"audit": folder, "audit_key": key}
    assert "begun when the service starts" in look("audit", **site)[0][1]
    assert look("audit", audit=folder)[0][0] == "fail"
    log = AuditLog.open(folder, key, Rules(fsync="never"))
    for _ in range(3):
        log.append(Event(route="/v1/classify"))
    log.close()
    later = datetime.now(UTC) + timedelta(days=1)
    assert look("audit", later, **site)[0][:2] == (
        "ok", f"{folder} has 4 lines; to read all: python -m serving.audit verify {folder} "
        f"--key {key}",
    )  # fmt: skip
    before = datetime(2026, 1, 2, tzinfo=UTC)
    assert any("which is to come" in words for _, words, _ in look("clock", before, **site))
    assert not any("which is to come" in words for _, words, _ in look("clock", later, **site))
    (file,) = files_of(folder)
    whole = file.read_bytes()
    file.write_bytes(whole + b"half")
    assert look("audit", later, **site)[0][0] == "note"
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert "ends at line 2 and had 4: it was cut off" in look("audit", later, **site)[0][1]
    file.write_bytes(whole.replace(b"classify", b"generate"))
    assert look("audit", later, **site)[0][0] == "fail"
    file.write_bytes(whole)
    head = (folder / "head.json").read_bytes()
    (folder / "head.json").unlink()
    assert "has no head.json" in look("audit", later, **site)[0][1]
    (folder / "head.json").write_bytes(head)
    inside = folder / "audit.key"
    inside.write_bytes(key.read_bytes())
    assert (
        "lies in the log's own folder"
        in look("audit", later, **{**site, "audit_key": inside})[0][1]
    )
    inside.unlink()
    file.unlink()
    assert "has no file of lines" in look("audit", later, **site)[0][1]
    key.unlink()
    assert look("audit", later, **site)[0][0] == "fail"
    key.write_text("no key")
    empty = {"audit": tmp_path / "new", "audit_key": key}
    assert look("audit", later, **empty) == []
    told = [one for one in look("audit key", later, **empty) if one[0] == "fail"]
    assert "is no key of an audit log" in told[0][1]
    assert told[0][2] == f"cp -p BACKUP_OF_THE_KEY {key}"


def test_ports(look):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        ((state, _, mend),) = look("port", addresses=[f"127.0.0.1:{number}"])
        assert state == "fail"
        assert f":{number}" in mend
    assert look("port", addresses=[f"127.0.0.1:{number}"])[0][0] == "ok"
    assert look("port", addresses=["127.0.0.1:door"])[0][0] == "fail"
    assert look("port", addresses=["127.0.0.1:70000"])[0][0] == "fail"


def test_disks(look, tmp_path, monkeypatch):
    assert {state for state, _, _ in look("disk")} == {"ok"}
    (tmp_path / "file").write_text("")
    found = look("disk", environment={"BENTOML_HOME": str(tmp_path / "file")})
    assert found[0][0] == "fail"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: usage(10**9, 10**9, 3 * 10**6))
    state, words, mend = look("disk")[0]
    assert state == "fail"
    assert "has 3 MB free, needs 200 MB" in words
    assert mend.startswith("make room")
    places = {"audit": tmp_path / "audit", "marks": tmp_path / "marks"}
    for what in ("audit log", "marks"):
        words = [words for _, words, _ in look("disk", **places) if f"({what})" in words]
        assert [one.endswith("needs 200 MB") for one in words] == [True]


def test_files_that_another_user_left_are_told(look, tmp_path, monkeypatch):
    (tmp_path / "marks/keys").mkdir(parents=True)
    registry = tmp_path / "marks/pixels.sha256"
    registry.touch()
    (tmp_path / "marks/notes.txt").touch()
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    state, words, mend = look("disk", marks=tmp_path / "marks")[0]
    assert (state, mend) == ("fail", f"chown {os.getuid()} {registry}")
    assert str(registry) in words
    assert not any("notes.txt" in words for _, words, _ in look("disk", marks=tmp_path / "marks"))


def test_a_folder_that_takes_no_files(look, tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refuse)
    assert "takes no files: Permission denied" in look("disk")[0][1]


def test_clocks(look, bundle, monkeypatch):
    assert look("clock")[0][0] == "ok"
    early = datetime(1970, 1, 2, tzinfo=UTC)
    state, words, mend = look("clock", early)[0]
    assert state == "fail"
    assert "before the bundle was made (2026-01-01)" in words
    assert "date -u" in mend
    assert look("clock", datetime(2126, 1, 1, tzinfo=UTC))[0][0] == "fail"
    now = machine.time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now + 3600)
    assert "files are dated 3600 seconds away" in look("clock")[0][1]


def test_threads_and_packages(look, monkeypatch):
    assert look("threads")[0][0] == "ok"
    assert "wait for each other" in look("threads", threads=10_000)[0][1]
    limited = {"OMP_NUM_THREADS": "1"}
    assert "OMP_NUM_THREADS=1" in look("threads", environment=limited, threads=2)[0][1]
    assert look("packages")[0][0] == "ok"
    monkeypatch.setattr("serving.doctor.report._there", lambda module: "otlp" not in module)
    ((state, _, mend),) = look("packages", otel_endpoint="http://localhost:4318/v1/traces")
    assert state == "fail"
    assert mend.endswith("opentelemetry-exporter-otlp-proto-http")


def test_the_command(bundle, tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("DERMAFLUX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    assert main([str(bundle.path), "--quick"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["healthy"] is True
    assert main([str(bundle.path), "--quick", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["core"] is None
    monkeypatch.setenv("DERMAFLUX_WAITING", "many")
    assert main([str(bundle.path), "--quick"]) == 1
    assert "fail settings" in capsys.readouterr().out
    monkeypatch.setenv("DERMAFLUX_WAITING", "1")
    monkeypatch.setenv("DERMAFLUX_KEYS", str(tmp_path / "absent"))
    assert main([str(bundle.path), "--quick", "--port", "127.0.0.1:door"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fail"] >= 2
