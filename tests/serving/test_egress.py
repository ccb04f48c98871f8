"""Nothing leaves, little is written, nothing of a request is in the log: of the service as it runs.

Where this machine lets an unprivileged user make namespaces, the service runs in one without any
route, as a user that is only a number, with every file system read-only but one folder. The kernel
counts who asks for a way out all the same, native libraries too. Everywhere every process of it
runs under an audit hook that writes down and denies connections to elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.audit.anchors import logged_anchors
from serving.audit.ending import files_of
from serving.audit.secret import Secrets
from serving.audit.verifying import verify
from serving.keys import line, made
from tests.core.test_doctor import with_golden
from tests.serving.live import picture
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
MARK = "Muster-Erika-1964"
"""As a name and a year of birth would be; a word that no program writes by itself."""
USER = 1034

HOOK = """
import os, sys

TRIED = {folder!r} + "/tried"

def note(text):
    file = os.open(TRIED, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (text + "\\n").encode())
    os.close(file)

def near(address):
    if not isinstance(address, tuple):
        return True     # a path: a Unix socket
    return str(address[0]) in ("localhost", "::1", "") or str(address[0]).startswith("127.")

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        there = arguments[1] if len(arguments) > 1 else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        there = (arguments[0] or "",)
    else:
        return
    if there is not None and not near(there):
        note(f"{{event}} {{there}}")
        raise OSError(101, "denied by the test")

sys.addaudithook(watch)
note("watched " + str(os.getpid()))
"""

CONFINE = """
set -eu
mount --bind "$FOLDER" "$FOLDER"
awk '{print $5}' /proc/self/mountinfo | sort -u | while read -r where; do
  case $where in
    "$FOLDER"|/proc*|/sys*|/dev*) ;;
    *) mount -o remount,bind,ro "$where" ;;
  esac
done
ip link set lo up
! touch "$ROOT/written" 2> /dev/null
exec "$@"
"""


@dataclass(frozen=True)
class Run:
    """What became of the service: what `alone.py` told, its log, who tried to leave, the files."""

    told: dict[str, object]
    log: str
    tried: list[str]
    written: set[str]
    metrics: dict[str, str]
    kept: dict[str, bytes]
    """Of the service that signs and records: every file of its audit log and its marks."""
    holds: bool
    """Whether the audit log holds, with the anchors that are in the service's log."""
    confined: bool
    key: str


def confinement() -> list[str]:
    """The start of a command that runs the rest in namespaces; empty where there are none."""
    flags = [f"--map-user={USER}", "--map-group=0", "--mount", "--net", "--keep-caps"]
    prefix = ["unshare", "--user", *flags, "bash", "-c", CONFINE, "confined"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*prefix, "true"], env={**os.environ, "FOLDER": folder, "ROOT": str(ROOT)}
            )
        except FileNotFoundError:
            return []
    return prefix if done.returncode == 0 else []


@pytest.fixture(scope="module", params=["json", "text"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    # Not pytest's own: a path of a Unix socket has at most 103 characters.
    folder = Path(tempfile.mkdtemp(prefix="alone-"))
    try:
        for name in ("home", "tmp", "hook"):
            (folder / name).mkdir()
        bundle = with_golden(write_bundle(folder / "bundle"))
        key, entry = made("ward3", ["generate", "classify", "free-text", "admin"])
        (folder / "keys.jsonl").write_text(line(entry))
        (folder / "keys.jsonl").chmod(0o600)
        (folder / "image.png").write_bytes(picture(200))
        (folder / "hook/sitecustomize.py").write_text(HOOK.format(folder=str(folder)))
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        variables = {
            "FOLDER": str(folder),
            "ROOT": str(ROOT),
            # No word of BENTOML_DO_NOT_TRACK: the service must see to that by itself.
            "BENTOML_HOME": str(folder / "home"),
            "DERMAFLUX_BUNDLE": str(bundle.path),
            "DERMAFLUX_KEYS": str(folder / "keys.jsonl"),
            "DERMAFLUX_LOG": request.param,
            "HOME": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{folder / 'hook'}:{ROOT}",
            "TMPDIR": str(folder / "tmp"),
        }
        if request.param == "json":
            variables |= {
                "DERMAFLUX_AUDIT": str(folder / "audit"),
                "DERMAFLUX_AUDIT_KEY": str(folder / "seal/audit.key"),
                "DERMAFLUX_MARKS": str(folder / "marks"),
                "DERMAFLUX_WATERMARK": "1",
            }
        prefix = confinement()
        before = files(folder)
        done = subprocess.run(
            [*prefix, sys.executable, str(ROOT / "tests/serving/alone.py"), folder, key, MARK],
            cwd=ROOT,
            env={**kept, **variables},
            capture_output=True,
            text=True,
            timeout=200,
        )
        log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
        assert done.returncode == 0, done.stderr + log
        yield Run(
            told=json.loads(done.stdout.splitlines()[-1]),
            log=log,
            tried=(folder / "tried").read_text().splitlines(),
            written=files(folder) - before,
            metrics={
                str(file.relative_to(folder)): file.read_text(errors="replace")
                for file in folder.rglob("*.db")
            },
            kept={
                str(file.relative_to(folder)): file.read_bytes()
                for name in ("audit", "seal", "marks")
                for file in (folder / name).rglob("*")
                if file.is_file()
            },
            holds=request.param != "json" or held(folder),
            confined=bool(prefix),
            key=key,
        )
    finally:
        shutil.rmtree(folder)


def held(folder: Path) -> bool:
    """Whether the audit log holds, with the anchors that are in the service's log."""
    secrets = Secrets.open(folder / "seal/audit.key")
    anchors = logged_anchors(folder / "log.txt")
    assert len(anchors) >= 2, "one at the start and one at the end"
    return verify(files_of(folder / "audit"), secrets, anchors).holds


LEAVE = """
import socket, sys
sys.path.insert(0, "tests/serving")
sys.argv = ["alone.py", ".", "", ""]
from alone import unreachable
before = unreachable()
for family, where in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as way:
                way.settimeout(0.1)
                way.connect((where, 9))
        except OSError:
            pass
try:
    socket.getaddrinfo("example.invalid", 80)
except OSError:
    pass
print(unreachable() - before)
"""


def test_attempts_would_be_seen(tmp_path: Path) -> None:
    """By the hook in Python, and by the kernel where there is no hook (`-I`)."""
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(folder=str(tmp_path)))
    prefix = confinement()
    for options, attempts, failures in (([], 5, 0), (["-I"], 0, 4)):
        done = subprocess.run(
            [*prefix, sys.executable, *options, "-c", LEAVE],
            cwd=ROOT,
            env={
                **os.environ,
                "FOLDER": str(tmp_path),
                "ROOT": str(ROOT),
                "PYTHONPATH": str(tmp_path),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        tried = (tmp_path / "tried").read_text().splitlines()
        assert len([told for told in tried if "socket." in told]) == attempts
        (tmp_path / "tried").write_text("")
        if prefix:
            assert int(done.stdout) >= failures


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_service_does_all_its_work_there(run: Run) -> None:
    assert run.told["replies"] == {
        **dict.fromkeys(("generate", "stream", "several", "classify", "batch", "verify"), 200),
        **dict.fromkeys(("model", "metrics", "page", "document", "text"), 200),
        "wrong": 422,
        "broken": 400,
        "kind": 415,
        "junk": 400,
        "unverifiable": 400,
        "address": 400,
        **dict.fromkeys(("nowhere", "side", "docs", "side door"), 404),
        "method": 405,
        "wrong key": 401,
    }
    assert run.told["status"] == 0
    if run.confined:
        assert run.told["user"] == USER


def test_nothing_tries_to_leave(run: Run) -> None:
    watched = [told for told in run.tried if told.startswith("watched ")]
    # The command, the process that draws and the one that classifies, and who asks them.
    assert len(watched) >= 4
    assert [told for told in run.tried if told not in watched] == []
    if run.confined:
        assert run.told["unreachable"] == 0


def test_only_a_folder_of_its_own_is_written_to(run: Run) -> None:
    # What stays is metrics: numbers under bounded labels.
    metrics = {name for name in run.written if name.startswith("home/prometheus_multiproc_dir/")}
    assert metrics
    assert {Path(name).suffix for name in metrics} == {".db"}
    assert run.written - metrics == {"log.txt", "tried", *run.kept}
    for name in metrics:
        assert MARK not in run.metrics[name]


def test_what_is_kept_holds_nothing_of_a_request(run: Run) -> None:
    if not run.kept:
        return
    keys = {f"marks/keys/{name}" for name in ("chain.pem", "key.pem", "anchors.pem")}
    log = {f"audit/{name}" for name in ("audit-000001.jsonl", "head.json", "lock")}
    others = {"marks/keys/watermark.keys", "marks/pixels.sha256", "seal/audit.key"}
    assert set(run.kept) == keys | log | others
    for content in run.kept.values():
        assert MARK.encode() not in content
        assert run.key[10:].encode() not in content
    lines = [json.loads(one) for one in run.kept["audit/audit-000001.jsonl"].splitlines()]
    told = [(one.get("caller"), one.get("route"), one.get("status")) for one in lines]
    assert ("ward3", "/v1/generate", 200) in told
    assert ("ward3", "/v1/verify", 400) in told
    assert (None, "/v1/model", 401) in told
    # The process of the classifier writes none, and the signal has let the log be closed.
    assert [one["event"] for one in lines].count("begun") == 1
    assert run.holds


def test_log_holds_nothing_of_a_request(run: Run) -> None:
    assert "POST /v1/generate 200" in run.log
    assert "GET other 404" in run.log
    for secret in (MARK, MARK.lower(), run.key, run.key[10:]):
        assert secret not in run.log
    for told in run.log.splitlines():
        if run.log.startswith("{"):
            assert set(json.loads(told)) >= {"time", "level", "logger", "message"}
        else:
            assert "?" not in told.partition(" serving.requests ")[2]
    assert "ward3" in run.log
