"""A backup of a running service holds, and is gone on with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.audit.log import AuditLog, Rules
from serving.audit.record import Event
from serving.audit.secret import Secrets
from serving.audit.verifying import verify

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/backup.sh"
EVENT = Event(route="/v1/classify", outcome="done", status=200)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    (tmp_path / "records/marks/keys").mkdir(parents=True)
    (tmp_path / "records/marks/keys/key.pem").write_text("secret")
    return tmp_path / "records"


def opened(records: Path) -> AuditLog:
    return AuditLog.open(records / "audit", records.parent / "audit.key", Rules(fsync="never"))


def holds(folder: Path, key: Path) -> tuple[bool, int]:
    found = verify(sorted(folder.glob("audit-*.jsonl")), Secrets.open(key))
    return found.holds, found.lines


def backup(*words: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", SCRIPT, *words], capture_output=True, text=True)


def test_a_log_that_is_copied_while_it_is_written_holds(records: Path, tmp_path: Path) -> None:
    log = opened(records)
    for _ in range(5):
        log.append(EVENT)
    # A cp after whose copy of the head, and of the lines, more is written.
    (tmp_path / "bin").mkdir()
    cp = tmp_path / "bin/cp"
    append = f"{sys.executable} {__file__} {records}"
    cp.write_text(
        f'#!/bin/sh\n/bin/cp "$@"\ncase "$*" in *head.json* | *.jsonl*) {append} ;; esac\n'
    )
    cp.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", SCRIPT, records, tmp_path / "copy"],
        env={"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    log.close()
    told, lines = holds(tmp_path / "copy/audit", tmp_path / "audit.key")
    assert told
    assert lines >= 10
    assert (tmp_path / "copy/marks/keys/key.pem").read_text() == "secret"
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0


def test_a_line_that_was_half_written_is_copied_once_it_is_whole(
    records: Path, tmp_path: Path
) -> None:
    log = opened(records)
    log.append(EVENT)
    # The first cp of the lines comes while the last one is being written.
    (tmp_path / "bin").mkdir()
    cp = tmp_path / "bin/cp"
    once = tmp_path / "once"
    halved = f'[ -e {once} ] || {{ truncate -s -20 "$3/audit-000001.jsonl"; touch {once}; }}'
    cp.write_text(f'#!/bin/sh\n/bin/cp "$@"\ncase "$2" in *.jsonl) {halved} ;; esac\n')
    cp.chmod(0o755)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    command = ["sh", SCRIPT, records, f"{tmp_path / 'a copy'}/"]
    done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log.close()
    assert once.exists()
    assert holds(tmp_path / "a copy/audit", tmp_path / "audit.key") == (True, 2)


def test_a_log_that_has_not_begun_is_copied_too(records: Path, tmp_path: Path) -> None:
    (records / "audit").mkdir()
    assert backup(records, tmp_path / "copy").returncode == 0
    assert list((tmp_path / "copy/audit").iterdir()) == []


def test_the_other_order_would_not_hold(records: Path, tmp_path: Path) -> None:
    log = opened(records)
    log.append(EVENT)
    (tmp_path / "copy").mkdir()
    for file in (records / "audit").glob("audit-*.jsonl"):
        shutil.copy(file, tmp_path / "copy")
    log.append(EVENT)
    shutil.copy(records / "audit/head.json", tmp_path / "copy")
    log.close()
    assert not holds(tmp_path / "copy", tmp_path / "audit.key")[0]


def test_what_is_restored_is_gone_on_with(records: Path, tmp_path: Path) -> None:
    log = opened(records)
    for _ in range(3):
        log.append(EVENT)
    assert backup(records, tmp_path / "copy").returncode == 0
    log.close()
    shutil.rmtree(records)
    assert backup(tmp_path / "copy", records).returncode == 0
    log = opened(records)
    log.append(EVENT)
    log.close()
    told, lines = holds(records / "audit", tmp_path / "audit.key")
    assert told
    assert lines > 4


def test_nothing_is_overwritten_and_nothing_is_nothing(records: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "there already" in backup(records, tmp_path / "there").stderr
    assert "neither audit/ nor marks/" in backup(tmp_path / "there", tmp_path / "new").stderr
    assert backup(records).returncode == 2


if __name__ == "__main__":
    # Another process that writes meanwhile.
    written = opened(Path(sys.argv[1]))
    for _ in range(5):
        written.append(EVENT)
    written.close()
