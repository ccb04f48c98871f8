"""API keys: what the command makes the service takes, and a broken file opens no door."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serving import keys
from serving.keyring import LOOK_SECONDS, MARK, Entry, Keyring, KeysError, digest, parse


def new(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, object]]:
    """A key and its line, of the command."""
    assert keys.main(["new", *arguments]) == 0
    told = capsys.readouterr()
    (key,) = re.findall(rf"{MARK}[\w-]+", told.err)
    return key, json.loads(told.out.splitlines()[-1])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += LOOK_SECONDS
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def test_key_is_random_recognisable_and_not_stored(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, entry = new(capsys, "--id", "ward3", "--roles", "classify,generate", "--file", str(file))
    other, _ = new(capsys, "--id", "ward4", "--roles", "classify", "--file", str(file))
    assert re.fullmatch(r"dermaflux_[A-Za-z0-9_-]{43}", key)
    assert key != other
    text = file.read_text()
    assert key not in text
    assert key.removeprefix(MARK) not in text
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert file.stat().st_mode & 0o777 == 0o600
    ring = Keyring(file)
    found = ring.find(key)
    assert found is not None
    assert (found.id, found.roles) == ("ward3", ["classify", "generate"])
    assert ring.find(key[:-1]) is None
    assert ring.find(str(entry["sha256"])) is None
    assert ring.find("") is None


def test_line_of_the_command_may_be_appended_by_a_shell(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, entry = new(capsys, "--id", "it", "--roles", "admin", "--note", "the IT")
    file.write_text("# our keys\n\n" + json.dumps(entry))
    # Appended to a file that does not end in a line's end.
    second, _ = new(capsys, "--id", "ward3", "--roles", "classify", "--file", str(file))
    ring = Keyring(file)
    assert [ring.find(one) is not None for one in (key, second)] == [True, True]


def test_key_ends_by_its_date_and_by_being_revoked(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _ = new(capsys, "--id", "a", "--roles", "classify", "--days", "2", "--file", str(file))
    ring = Keyring(file, clock=Clock())
    now = datetime.now(UTC)
    assert ring.find(key, now + timedelta(days=1)) is not None
    assert ring.find(key, now + timedelta(days=3)) is None
    file.chmod(0o640)
    assert keys.main(["revoke", str(file), "--id", "a"]) == 0
    assert ring.find(key) is None
    assert file.stat().st_mode & 0o777 == 0o640
    assert keys.main(["revoke", str(file), "--id", "a"]) == 2
    # The line stays for the record, and the id may be given again.
    again, _ = new(capsys, "--id", "a", "--roles", "admin", "--file", str(file))
    found = ring.find(again)
    assert found is not None
    assert found.roles == ["admin"]


def test_list_and_check_tell_the_state_and_no_hash(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, entry = new(capsys, "--id", "a", "--roles", "classify", "--file", str(file))
    for given, state, status in ((key, "valid", 0), ("guess", "unknown", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{given}\n"))
        assert keys.main(["check", str(file)]) == status
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == state
    keys.main(["revoke", str(file), "--id", "a"])
    monkeypatch.setattr("sys.stdin", io.StringIO(key))
    assert keys.main(["check", str(file)]) == 1
    capsys.readouterr()
    keys.main(["list", str(file)])
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["keys"][0]["state"] == "revoked"
    assert str(entry["sha256"]) not in told.out + told.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--id", "a b", "--roles", "classify"],
        ["--id", "anonymous", "--roles", "classify"],
        ["--id", "a" * 33, "--roles", "classify"],
        ["--id", "a", "--roles", "boss"],
        ["--id", "a", "--roles", ","],
        ["--id", "a", "--roles", "admin", "--days", "0"],
        ["--id", "a", "--roles", "admin", "--days", "nan"],
    ],
)
def test_senseless_keys_are_not_made(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys.main(["new", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert MARK not in told.err


def test_id_has_one_key_at_a_time(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new(capsys, "--id", "a", "--roles", "admin", "--file", str(file))
    before = file.read_bytes()
    assert keys.main(["new", "--id", "a", "--roles", "admin", "--file", str(file)]) == 2
    assert file.read_bytes() == before
    assert MARK not in capsys.readouterr().err


LINE = json.dumps(
    {
        "id": "a",
        "sha256": digest("secret"),
        "roles": ["classify"],
        "created": "2026-01-31T09:00:00Z",
    }
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "has no key"),
        ("# nobody\n", "has no key"),
        ("not JSON", "line 1"),
        ("[1]", "line 1"),
        (LINE[:-20], "line 1"),
        (LINE + "\n" + LINE, "several keys"),
        (LINE.replace("classify", "root"), "roles.0"),
        (LINE.replace('["classify"]', "[]"), "roles"),
        (LINE.replace("sha256", "sha1"), "sha256"),
        (LINE.replace("T09:00:00Z", "T09:00:00"), "created"),
        (LINE[:-1] + ', "admin": true}', "admin"),
    ],
)
def test_wrong_lines_are_refused_without_being_repeated(text: str, fault: str) -> None:
    with pytest.raises(KeysError, match=fault) as told:
        parse(text, "keys.jsonl")
    assert digest("secret") not in str(told.value)


def test_change_of_the_file_is_seen_and_a_broken_one_opens_and_closes_nothing(
    file: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = new(capsys, "--id", "a", "--roles", "classify", "--file", str(file))
    ring = Keyring(file, clock=Clock())
    second, _ = new(capsys, "--id", "b", "--roles", "classify", "--file", str(file))
    assert ring.find(second) is not None
    for broken in (lambda: file.write_text("{"), lambda: file.write_text(""), file.unlink):
        caplog.clear()
        broken()
        assert ring.find(first) is not None
        assert ring.find("secret") is None
        # Said once, not at every request.
        assert ring.find(first) is not None
        errors = [one for one in caplog.records if one.levelno == logging.ERROR]
        assert len(errors) == 1, broken
        assert "the keys stay as they were" in errors[0].message
    file.write_text(LINE)
    assert ring.find(first) is None
    assert ring.find("secret") is not None


def test_file_is_looked_at_no_more_than_once_a_second(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(LINE)
    clock = Clock()
    ring = Keyring(file, clock=lambda: clock.now)
    file.write_text(LINE.replace(digest("secret"), digest("other")))
    assert ring.find("other") is None
    clock()
    assert ring.find("other") is not None


def test_file_that_others_may_read_is_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text(LINE)
    for mode, warned in ((0o600, False), (0o640, False), (0o400, False), (0o644, True)):
        caplog.clear()
        os.chmod(file, mode)
        Keyring(file)
        assert ("may be read or written by others" in caplog.text) == warned, oct(mode)


def test_keys_of_the_environment_and_of_the_file_stand_together(file: Path) -> None:
    file.write_text(LINE)
    other = LINE.replace('"a"', '"b"').replace(digest("secret"), digest("other"))
    ring = Keyring(file, other)
    assert [ring.find(key) is not None for key in ("secret", "other")] == [True, True]
    with pytest.raises(KeysError, match="several keys"):
        Keyring(file, LINE)
    with pytest.raises(KeysError, match="INLINE, line 1"):
        Keyring(None, "secret")


def test_file_that_is_not_there_or_no_file_of_keys_is_refused(file: Path) -> None:
    with pytest.raises(KeysError, match=r"Make the file with: python -m serving\.keys new"):
        Keyring(file)
    file.write_bytes(b"\xff" * 10)
    with pytest.raises(KeysError, match="UTF-8"):
        Keyring(file)
    file.write_bytes(b"#" * 1_000_001)
    with pytest.raises(KeysError, match="more than"):
        Keyring(file)


def test_all_entries_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time of an answer does not tell where in the file a key is."""
    lines = [
        LINE.replace('"a"', f'"a{n}"').replace(digest("secret"), digest(f"{n}")) for n in range(5)
    ]
    ring = Keyring(None, "\n".join(lines))
    compared: list[str] = []
    monkeypatch.setattr(
        "serving.keyring.hmac.compare_digest", lambda a, b: compared.append(b) or a == b
    )
    found = ring.find("1")
    assert isinstance(found, Entry)
    assert found.id == "a1"
    assert len(compared) == 5
