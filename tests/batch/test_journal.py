from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from dermaflux.errors import DatasetError
from serving.batch.journal import Entry, Journal, read


def entry(name: str = "a", attempt: int = 0, state: str = "kept", time: str = "1") -> Entry:
    return Entry(name, attempt, state, "digest", 7, time, "engine")


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    wanted = replace(entry(), reasons=("é\nü",), measures='{"size": "small", "found": true}')
    with Journal.open(tmp_path, "1-of-2") as journal:
        journal.append([wanted])
    with Journal.open(tmp_path, "2-of-2") as journal:
        journal.append([entry("b", state="failed")])
    ledger = read(tmp_path)
    assert ledger.kept == {"a": wanted}
    assert set(ledger.failed) == {"b"}


def test_a_line_that_a_kill_cut_off_is_taken_away(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "1-of-1") as journal:
        journal.append([entry("a"), entry("b")])
        file = journal.path
    whole = file.read_bytes()
    for cut in range(1, len(whole) // 2):
        file.write_bytes(whole[:-cut])
        assert set(read(tmp_path).kept) == {"a"}
        with Journal.open(tmp_path, "1-of-1") as journal:
            journal.append([entry("c")])
        assert set(read(tmp_path).kept) == {"a", "c"}


def test_a_damaged_line_is_drawn_again_and_its_neighbours_are_not(tmp_path: Path, caplog) -> None:
    with Journal.open(tmp_path, "1-of-1") as journal:
        journal.append([entry(name) for name in "abc"])
        file = journal.path
    lines = file.read_bytes().split(b"\n")
    wrong = lines[1].replace(b'"time": "1"', b'"time": 1')
    assert wrong != lines[1]
    for damage in (
        wrong,
        b"\0" * 20,
        b"{}",
        b"[]",
        lines[1].replace(b"kept", b"lost"),
        b"[" * 9999,
    ):
        file.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
        assert set(read(tmp_path).kept) == {"a", "c"}
        assert "line 2" in caplog.text


def test_two_processes_cannot_write_one_share(tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path, "1-of-1"),
        pytest.raises(DatasetError, match="another process"),
    ):
        Journal.open(tmp_path, "1-of-1")
    Journal.open(tmp_path, "1-of-1").close()


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch) -> None:
    real = os.write

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 150:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    with Journal.open(tmp_path, "1-of-1") as journal:
        journal.append([entry("a")])
        before = journal.path.read_bytes()
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            journal.append([entry("b"), entry("c")])
        assert journal.path.read_bytes() == before


def test_the_next_try_is_the_first_that_is_not_settled(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "1-of-1") as journal:
        journal.append([entry("a", 0, "rejected", "1"), entry("a", 1, "failed", "2")])
    ledger = read(tmp_path)
    assert ledger.next_attempt("a", 3) == 1
    assert ledger.next_attempt("a", 1) is None
    assert ledger.next_attempt("new", 1) == 0
    assert ledger.has_failed("a", 3)
    assert not ledger.has_failed("a", 1)
    ledger.add(entry("a", 1, "kept"))
    assert ledger.next_attempt("a", 3) is None
    assert not ledger.has_failed("a", 3)
    ledger.forget(ledger.kept["a"])
    assert ledger.next_attempt("a", 3) == 1


def test_of_two_words_on_one_try_the_later_holds(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "1-of-1") as journal:
        journal.append([entry("a", 0, "kept", "1"), entry("a", 0, "rejected", "2")])
        journal.append([entry("b", 0, "rejected", "1"), entry("b", 0, "kept", "2")])
    ledger = read(tmp_path)
    assert set(ledger.kept) == {"b"}
    assert {name: set(tries) for name, tries in ledger.rejected.items()} == {"a": {0}, "b": set()}


def test_what_is_kept_stays_kept_though_another_clock_is_ahead(tmp_path: Path) -> None:
    with Journal.open(tmp_path, "1-of-2") as journal:
        journal.append([entry("a", 0, "failed", "9")])
    with Journal.open(tmp_path, "2-of-2") as journal:
        journal.append([entry("a", 0, "kept", "1")])
    ledger = read(tmp_path)
    assert ledger.next_attempt("a", 1) is None
    assert not ledger.has_failed("a", 1)
