"""The audit log: nothing in it can be changed unseen, and nothing that was to be in it is lost."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving.audit import ending, secret
from serving.audit import log as writing
from serving.audit.__main__ import main
from serving.audit.anchors import LOGGED
from serving.audit.ending import files_of
from serving.audit.log import AuditLog, Rules
from serving.audit.record import MAX_LINE, MAX_RESULTS, Event, answer_hash
from serving.audit.secret import AuditError, Secrets
from serving.audit.verifying import verify

ROOT = Path(__file__).resolve().parents[2]
DONE = {"route": "/v1/generate", "outcome": "done", "status": 200, "bundle": "0" * 16}


def event(number: int = 0) -> Event:
    return Event(caller=f"ward{number}", results=(f"{number:064x}",), request=f"r{number}", **DONE)


class Site:
    """A folder with a log and its key."""

    def __init__(self, path: Path) -> None:
        self.folder, self.key = path / "audit", path / "audit.key"

    def open(self, **rules) -> AuditLog:
        return AuditLog.open(self.folder, self.key, Rules(**{"fsync": "never", **rules}))

    def fill(self, count: int, **rules) -> list[str]:
        """Write so many events, one by one; the anchor of each line."""
        log = self.open(**rules)
        anchors = []
        for number in range(count):
            log.append(event(number))
            anchors.append(f"{log._n}:{log._hash}")
        log.close()
        return anchors

    @property
    def files(self) -> list[Path]:
        return files_of(self.folder)

    @property
    def lines(self) -> list[bytes]:
        return b"".join(file.read_bytes() for file in self.files).splitlines(keepends=True)

    @property
    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines]

    def verify(self, keyed: bool = True, anchors=()):
        return verify(self.files, Secrets.open(self.key) if keyed else None, anchors)

    def rewrite(self, lines) -> None:
        self.files[-1].write_bytes(b"".join(lines))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_log_that_nobody_touched_holds(site):
    anchors = site.fill(5)
    found = site.verify(anchors=anchors)
    assert found.holds, found.faults
    assert (found.lines, found.first, found.last) == (6, 1, 6)
    assert site.events == ["begun"] + ["request"] * 5
    assert site.verify(keyed=False, anchors=anchors).holds
    line = json.loads(site.lines[1])
    assert line["caller"] == "ward0"
    assert line["results"] == ["0" * 64]
    assert "address" not in line


def test_any_byte_that_was_changed_is_found(site):
    site.fill(2)
    whole = b"".join(site.lines)
    secrets, (file,) = Secrets.open(site.key), site.files
    for place in range(len(whole)):
        row = whole.count(b"\n", 0, place) + 1
        edited = bytearray(whole)
        edited[place] ^= (1, 0x20, 0x80)[place % 3]
        file.write_bytes(edited)
        found = verify([file], secrets)
        assert not found.holds, place
        assert found.faults[0].line == row, place
        # Who has no key sees it by the next line, or by the head.
        assert not verify([file]).holds, place


def test_any_byte_that_was_put_in_or_taken_out_is_found(site):
    site.fill(1)
    whole = b"".join(site.lines)
    secrets, (file,) = Secrets.open(site.key), site.files
    for place in range(len(whole)):
        for edited in (whole[:place] + whole[place + 1 :], whole[:place] + b" " + whole[place:]):
            file.write_bytes(edited)
            assert not verify([file], secrets).holds, place


def test_lines_removed_repeated_and_moved_are_found(site):
    site.fill(6)
    lines = site.lines
    for a in range(len(lines)):
        site.rewrite(lines[:a] + lines[a + 1 :])
        assert not site.verify().holds
        assert not site.verify(keyed=False).holds
        site.rewrite([*lines[: a + 1], *lines[a:]])
        found = site.verify()
        assert "repeats the line before it" in found.faults[0].words
        assert found.faults[0].line == a + 2
    for a, b in itertools.combinations(range(len(lines)), 2):
        moved = list(lines)
        moved[a], moved[b] = moved[b], moved[a]
        site.rewrite(moved)
        assert not site.verify().holds
        assert not site.verify(keyed=False).holds
        site.rewrite(lines[: b + 1] + [lines[a]] + lines[b + 1 :])
        assert "is out of order or repeated" in site.verify().faults[0].words
        site.rewrite(lines[:a] + lines[b:])  # a span was cut out
        assert not site.verify().holds


def test_one_edit_is_told_once_with_its_line(site):
    site.fill(6)
    lines = site.lines
    lines[3] = lines[3].replace(b"ward2", b"ward9")
    site.rewrite(lines)
    (fault,) = site.verify().faults
    assert str(fault) == (
        "audit-000001.jsonl, line 4: was edited: its content is not what was sealed"
    )
    (fault,) = site.verify(keyed=False).faults
    assert fault.line == 5
    assert "that one was edited" in fault.words


def test_foreign_lines_do_not_hide_the_rest(site):
    site.fill(6)
    lines = site.lines
    site.rewrite([*lines[:3], *[b"nonsense\n"] * 5, *lines[3:]])
    found = site.verify()
    assert [fault.line for fault in found.faults] == [4, 5, 6, 7, 8]
    assert found.last == len(lines)


def test_an_end_that_was_cut_off_is_told_by_head_and_anchor(site):
    anchors = site.fill(6)
    lines = site.lines
    site.rewrite(lines[:4])
    (fault,) = site.verify().faults
    assert "it ends at n 4, and head.json tells of n 7" in fault.words
    (site.folder / "head.json").unlink()
    (fault,) = site.verify().faults
    assert "nothing shows that no lines were cut off its end, after n 4" in fault.words
    assert not site.verify(anchors=anchors[-1:]).holds
    assert not site.verify(anchors=[anchors[-1].split(":")[1]]).holds
    assert site.verify(anchors=anchors[:3]).holds  # that is the last line
    assert site.verify(anchors=[anchors[2].split(":")[1]]).holds
    assert not site.verify(anchors=anchors[:2]).holds


def test_a_head_that_is_gone_is_noted_by_the_next_start(site):
    site.fill(6)
    lines, head = site.lines, site.folder / "head.json"
    for harm in (head.unlink, lambda: head.write_bytes(b"")):
        site.rewrite(lines[:4])
        harm()
        site.fill(1)
        assert site.events[4:] == ["head-gone", "request"]
        assert "line 5: head.json was gone" in site.verify().notes[0]
        head.unlink()
    site.rewrite(lines[:4])
    head.write_bytes(b"nonsense")
    site.fill(1)
    assert site.events[4:] == ["head-damaged", "request"]
    assert "line 5: head.json was damaged" in site.verify().notes[0]


def test_a_last_line_that_was_replaced_stays_a_fault(site):
    site.fill(2)
    first = site.lines
    head = (site.folder / "head.json").read_bytes()
    site.rewrite(first[:2])
    (site.folder / "head.json").unlink()
    site.fill(1)  # by who has the key: another line of the same number
    site.rewrite([*first[:2], site.lines[2]])
    (site.folder / "head.json").write_bytes(head)
    site.fill(1)
    assert site.events[-2:] == ["replaced", "request"]
    (fault,) = site.verify().faults
    assert "noted that the line before was put there in place of another" in fault.words


def test_a_log_can_be_verified_while_it_is_written(site):
    log = site.open(rotate_bytes=100_000)
    longest = [Event(caller="child", results=("f" * 64,) * 90)] * 5
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            log.append(*longest)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(60):
            found = verify(site.files[-1:], Secrets.open(site.key))
            assert found.holds, found.faults
    finally:
        over.set()
        thread.join()
    log.close()


def test_who_writes_the_whole_anew_needs_the_key(tmp_path):
    true, false = Site(tmp_path / "true"), Site(tmp_path / "false")
    anchors = true.fill(4)
    false.fill(4)
    forged = verify(false.files, Secrets.open(true.key))
    assert "head.json is not what was written" in forged.faults[0].words
    assert "which is not among those given" in forged.faults[1].words
    assert verify(false.files, None).holds  # without the key the chain alone is no proof
    assert not verify(false.files, None, anchors[-1:]).holds


def test_lines_of_another_log_do_not_fit(site, tmp_path):
    """Another site's, and one that was sealed with the very same key."""
    site.fill(4)
    lines = site.lines
    for key in (None, site.key.read_bytes()):
        other = Site(tmp_path / f"other{bool(key)}")
        other.folder.parent.mkdir()
        if key:
            other.key.write_bytes(key)
        other.fill(6)
        for cut in range(1, 5):
            site.rewrite([*lines[:cut], *other.lines[cut:]])
            (site.folder / "head.json").write_bytes((other.folder / "head.json").read_bytes())
            assert not site.verify().holds
            assert not site.verify(keyed=False).holds
            site.rewrite([*lines[:cut], other.lines[cut], *lines[cut:]])
            assert not site.verify().holds


def test_a_folder_that_was_emptied_is_begun_anew_and_anchors_tell(site):
    anchors = site.fill(3)
    for file in [*site.folder.iterdir(), site.key]:
        file.unlink()
    site.fill(3)
    assert site.events[0] == "begun"
    assert site.verify().holds
    assert not site.verify(anchors=anchors[-1:]).holds


def test_an_older_head_does_not_fool_anchors(site):
    site.fill(3)
    old = (site.folder / "head.json").read_bytes(), site.lines
    anchors = site.fill(3)
    site.rewrite(old[1])
    (site.folder / "head.json").write_bytes(old[0])
    assert site.verify().holds
    assert not site.verify(anchors=anchors[-1:]).holds
    (site.folder / "head.json").write_bytes(old[0].replace(b'"n":4', b'"n":3'))
    assert "not what was written there" in site.verify().faults[0].words


def test_wherever_a_kill_comes_the_next_start_mends(site):
    site.fill(2)
    head = (site.folder / "head.json").read_bytes()
    lines = site.lines
    site.fill(1)
    last = site.lines[3]
    cuts = [1, 2, *range(3, len(last) - 2, 23), len(last) - 2, len(last) - 1]
    for cut in cuts:
        site.rewrite([*lines, last[:cut]])
        (site.folder / "head.json").write_bytes(head)
        assert "is half a line" in site.verify().faults[0].words
        site.fill(1)
        found = site.verify()
        assert found.holds, found.faults
        assert site.events[-2:] == ["mended", "request"]
        assert json.loads(site.lines[-2])["note"] == {"bytes": cut, "after": 3}
    kept = (site.folder / "torn.jsonl").read_text().splitlines()
    assert len(kept) == len(cuts)
    assert site.verify().notes == [
        f"{len(kept)} pieces of lines that a kill cut off are in {site.folder / 'torn.jsonl'}"
    ]


def test_a_process_killed_in_the_middle_of_a_line(site):
    site.fill(1)
    code = f"""
import os, signal
from pathlib import Path
from serving.audit.log import AuditLog, Rules
from serving.audit.record import Event
log = AuditLog.open(Path({str(site.folder)!r}), Path({str(site.key)!r}), Rules(fsync="never"))
log.append(Event(route="/v1/classify", outcome="done"))
whole = os.write
def half(descriptor, data):
    whole(descriptor, bytes(data)[:100])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
log.append(Event(route="/v1/classify", outcome="lost"))
"""
    other = site.open()  # stays open, as another worker does
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    other.append(event(1))
    other.close()
    assert site.verify().holds
    assert site.events == ["begun", "request", "request", "mended", "request"]


def test_threads_and_processes_append_to_one_chain(site):
    code = f"""
from pathlib import Path
from serving.audit.log import AuditLog, Rules
from serving.audit.record import Event
rules = Rules(fsync="never", rotate_bytes=20_000)
log = AuditLog.open(Path({str(site.folder)!r}), Path({str(site.key)!r}), rules)
for number in range(100):
    log.append(Event(caller="child", request=f"c{{number}}"))
"""
    log = site.open(rotate_bytes=20_000)
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def work(thread: int) -> None:
        for number in range(50):
            log.append(Event(caller=f"t{thread}", request=f"r{number}"))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert child.wait(60) == 0
    log.close()
    found = site.verify()
    assert found.holds, found.faults
    assert site.events.count("request") == 4 * 50 + 100
    assert len(site.files) > 2
    rows = [json.loads(line) for line in site.lines]
    for caller in ("t0", "t3", "child"):  # each in its own order
        mine = [int(row["request"][1:]) for row in rows if row.get("caller") == caller]
        assert mine == sorted(mine)


def test_nobody_writes_while_another_holds_the_lock(site):
    log = site.open()
    with (site.folder / "lock").open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=log.append, args=(event(),))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert site.events == ["begun"]
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join()
    assert site.events == ["begun", "request"]
    log.close()


def test_who_removes_the_lock_sets_nobody_free(site):
    one = site.open()
    (site.folder / "lock").unlink()
    other = site.open()

    def work(log: AuditLog) -> None:
        for number in range(200):
            log.append(event(number))

    threads = [threading.Thread(target=work, args=(log,)) for log in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = site.verify()
    assert found.holds, found.faults
    assert site.events.count("request") == 400
    one.close()
    other.close()


def test_a_head_that_was_put_back_is_gone_on_with(site):
    log = site.open()
    head = site.folder / "head.json"
    copy = head.read_bytes()
    head.unlink()
    head.write_bytes(copy)
    log.append(event())
    assert b'"n":2,' in head.read_bytes()
    log.close()


def test_a_file_that_another_process_began_is_gone_on_with(site):
    rules = {"rotate_bytes": 1_500}
    one, other = site.open(**rules), site.open(**rules)
    for number in range(20):
        (one, other)[number % 2].append(event(number))
        # Whoever filled a file finds that the other one has begun the next.
        while site.files[-1].stat().st_size < 1_500:
            one.append(event(number))
        other.append(event(number))
        one.append(event(number))
        assert site.verify().holds
    assert len(site.files) > 20
    one.close()
    other.close()


def test_the_chain_goes_on_over_files(site):
    site.fill(30, rotate_bytes=1_500)
    assert len(site.files) > 4
    assert site.verify().holds
    first, second, *rest = site.files
    secrets = Secrets.open(site.key)
    found = verify([second, *rest], secrets)
    assert found.holds
    assert any("begin at n" in note for note in found.notes)
    assert not verify([first, *rest], secrets).holds
    assert not verify([second, first, *rest], secrets).holds
    # A file by itself ends with the line that the next one follows.
    assert verify([first], secrets).holds
    cut = first.read_bytes()
    first.write_bytes(cut[: cut.rindex(b"\n", 0, -1) + 1])
    (fault,) = verify([first], secrets).faults
    assert "the next file goes on after n" in fault.words
    first.write_bytes(cut)
    whole = second.read_bytes()
    second.write_bytes(whole.partition(b"\n")[2])  # a file's beginning was cut off
    assert "lines are missing" in verify([second, *rest], secrets).faults[0].words
    second.write_bytes(whole)
    # A kill between a new file and its first line.
    ending.file_of(site.folder, len(site.files) + 1).touch()
    site.fill(1)
    assert site.verify().holds


def test_lines_that_are_gone_are_noted_by_the_next_start(site):
    site.fill(4)
    site.rewrite(site.lines[:3])
    site.fill(1)
    assert site.events[-2:] == ["missing", "request"]
    (fault,) = site.verify().faults
    assert "lines are missing before it, n 4 to 5 (the log itself noted it)" in fault.words
    for file in site.files:
        file.unlink()
    site.fill(1)
    assert site.events == ["missing", "request"]
    assert site.files[0].name == "audit-000002.jsonl"


def test_a_foreign_last_line_is_not_written_behind(site):
    site.fill(2)
    lines = site.lines
    site.rewrite([*lines[:-1], lines[-1].replace(b"ward1", b"ward7")])
    with pytest.raises(AuditError, match="none that was written here"):
        site.open()
    site.rewrite(lines)
    site.key.write_text("ab" * 32 + "\n")
    with pytest.raises(AuditError, match="which is not in the key file"):
        site.open()
    site.key.unlink()
    with pytest.raises(AuditError, match="take it from the backup"):
        site.open()


def test_a_new_key_seals_and_the_old_one_verifies(site, capsys):
    site.fill(1)
    assert main(["key", str(site.key)]) == 0
    site.fill(1)
    assert len({json.loads(line)["key"] for line in site.lines}) == 2
    assert site.verify().holds
    assert os.stat(site.key).st_mode & 0o777 == 0o600


def test_who_runs_already_learns_of_a_new_key(site):
    one = site.open()
    secret.add(site.key)
    other = site.open()
    other.append(event(1))
    one.append(event(2))
    other.append(event(3))
    assert site.events == ["begun", *["request"] * 3]
    assert site.verify().holds
    one.close()
    other.close()


def test_a_key_is_added_behind_a_line_without_an_end(site, monkeypatch):
    site.fill(1)
    pasted = site.key.read_text().strip()
    site.key.write_text(pasted)
    made = secret.add(site.key)
    assert Secrets.open(site.key).current.id == made.id
    assert site.verify().holds
    before = site.key.read_bytes()
    with monkeypatch.context() as patch:
        full(patch, 20)
        with pytest.raises(OSError, match="No space left"):
            secret.add(site.key)
    assert site.key.read_bytes() == before


def full(monkeypatch, after: int = 0) -> None:
    """From now on the disk takes `after` bytes."""
    whole, room = os.write, [after]

    def write(descriptor: int, data) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = whole(descriptor, bytes(data)[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("room", [0, 1, 150, 400])
def test_a_full_disk_refuses_what_has_to_be_recorded(site, monkeypatch, room):
    log = site.open(required=True)
    log.append(event(0))
    before = site.lines
    with monkeypatch.context() as patch:
        full(patch, room)
        with pytest.raises(AuditError, match="No space left on device"):
            log.append(event(1), event(2))
        assert site.lines == before
    log.append(event(3))
    log.close()
    assert site.verify().holds
    assert site.events == ["begun", "request", "gap", "request"]
    assert json.loads(site.lines[2])["note"]["lost"] == 2


def test_a_full_disk_is_noted_where_records_may_be_lost(site, monkeypatch, caplog):
    log = site.open(required=False)
    with monkeypatch.context() as patch:
        full(patch)
        for number in range(3):
            log.append(event(number))
    assert "1 events not recorded" in caplog.text
    log.append(event(9))
    log.close()
    assert site.verify().holds
    assert json.loads(site.lines[1])["note"]["lost"] == 3


def test_a_full_disk_is_told_before_the_work(site, monkeypatch):
    log = site.open(required=True)
    log.check()
    monkeypatch.setattr(writing, "ROOM", 2**70)
    with pytest.raises(AuditError, match="is full"):
        log.check()
    log.close()
    free = Site(site.folder.parent / "free").open(required=False)
    free.check()
    free.close()


@pytest.mark.parametrize(
    ("fsync", "least", "most"), [("always", 20, 20), ("second", 0, 1), ("never", 0, 0)]
)
def test_the_disk_is_waited_for_as_the_rule_says(site, monkeypatch, fsync, least, most):
    log = site.open(fsync=fsync)
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    for number in range(20):
        log.append(event(number))
    assert least <= len(calls) <= most


def test_anchors_go_to_the_log_of_the_service(site, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    site.fill(25, anchor_lines=10)
    anchors = [f"{n}:{value}" for n, value in LOGGED.findall(caplog.text)]
    assert [int(anchor.split(":")[0]) for anchor in anchors] == [1, 11, 21, 26]
    assert site.verify(anchors=anchors).holds
    service = tmp_path / "service.log"
    service.write_text(caplog.text)
    site.rewrite(site.lines[:12])
    assert main(["verify", str(site.folder), "--anchors", str(service)]) == 1


def test_each_file_ends_with_an_anchor(site, caplog):
    caplog.set_level(logging.INFO)
    site.fill(12, rotate_bytes=1_500)
    anchors = {int(n): f"{n}:{value}" for n, value in LOGGED.findall(caplog.text)}
    archive = site.folder.parent / "archive"
    archive.mkdir()
    kept = [file.rename(archive / file.name) for file in site.files[:2]]
    secrets = Secrets.open(site.key)
    for file in kept:
        whole = file.read_bytes()
        last = json.loads(whole.splitlines()[-1])["n"]
        assert verify([file], secrets, [anchors[last]]).holds
        file.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
        assert not verify([file], secrets, [anchors[last]]).holds
        assert not verify([file], secrets).holds
        file.write_bytes(whole)
    assert verify([*kept, *site.files], secrets).holds


def test_a_head_that_cannot_be_written_loses_no_line(site, monkeypatch, caplog):
    log = site.open(required=True)

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        log.append(event(1))
    assert "head.json is not up to date" in caplog.text
    log.append(event(2))
    log.close()
    assert site.events == ["begun", "request", "request"]
    assert site.verify().holds


SECRETS = ("John Smith, 12 March", "/srv/photos/smith.jpg", "a\nb", "é", "x" * 65, "<script>")


@pytest.mark.parametrize(
    "field", ["event", "caller", "route", "outcome", "bundle", "request", "address", "results"]
)
def test_no_prompt_or_file_name_fits_into_a_line(field):
    for text in SECRETS:
        value = (text,) if field == "results" else text
        with pytest.raises(ValueError, match=r"the audit log takes") as caught:
            Event(**{field: value})
        assert text not in str(caught.value)
    with pytest.raises(ValueError, match="short words"):
        Event(note={"words": "two words"})


def test_the_longest_event_fits_a_line(site):
    log = site.open()
    longest = Event(
        event="e" * 40, caller="c" * 32, route="/" + "r" * 99, outcome="o" * 40, status=599,
        bundle="f" * 16, results=("f" * 64,) * MAX_RESULTS, request="q" * 64, address="f" * 45,
        note={f"n{number}" + "n" * 38: "v" * 64 for number in range(10)},
    )  # fmt: skip
    log.append(longest)
    log.close()
    assert max(map(len, site.lines)) < MAX_LINE
    assert site.verify().holds


def test_noise_is_told_and_never_crashes(site):
    site.fill(3)
    draw = random.Random(0)
    whole = b"".join(site.lines)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 40)):
            place = draw.randrange(len(data))
            data[place : place + draw.randint(0, 30)] = draw.randbytes(draw.randint(0, 30))
        site.rewrite([bytes(data)])
        assert not site.verify().holds or bytes(data) == whole
    site.rewrite([b"x" * (3 * MAX_LINE) + b"\n", whole])
    assert "no line has" in site.verify().faults[0].words
    site.rewrite([])
    (site.folder / "head.json").unlink()
    assert [fault.words for fault in site.verify().faults] == ["there is no line at all"]


def test_equal_answers_have_one_hash():
    assert answer_hash({"a": 1, "b": 0.5}) == answer_hash({"b": 0.5, "a": 1})
    assert answer_hash({"a": 1}) != answer_hash({"a": 2})


def test_the_commands(site, tmp_path, capsys):
    site.fill(5)
    assert main(["verify", str(site.folder), "--key", str(site.key)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["holds"] is True
    assert summary["keyed"] is True
    assert summary["lines"] == 6

    assert main(["tail", str(site.folder), "-n", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["caller"] for line in shown] == ["ward3", "ward4"]

    table = tmp_path / "table.csv"
    asked = ["export", str(site.folder), "--out", str(table)]
    assert main([*asked, "--from", "2020-01-01", "--to", "2100-01-01"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"] == 6
    assert len(table.read_text().splitlines()) == 7
    assert main([*asked, "--from", "2100-01-01"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lines"] == 0

    lines = site.lines
    site.rewrite([lines[0], lines[1].replace(b"ward0", b"=cmd0"), *lines[2:]])
    assert main(asked) == 0
    assert ",'=cmd0," in table.read_text()
    capsys.readouterr()
    site.rewrite([*lines[:2], b'{"n": 3}\n', *lines[3:]])
    assert main(["verify", str(site.folder)]) == 1
    assert "fail audit-000001.jsonl, line 3: is no line" in capsys.readouterr().out
    assert main(asked) == 2
    assert "line 3 is no line of an audit log" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify", str(site.folder), "--anchor", "me"]) == 2
    assert "is no anchor" in capsys.readouterr().err
