"""What other processes took: the machine's busy time less that of this one's tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import machine, others, processes
from benchmarks.others import Reading, adopting, quiet, reading, share, told, wait_for_group

TICK = os.sysconf("SC_CLK_TCK")
BURNS = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def test_busy_is_what_is_neither_idle_nor_another_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, child, stranger = os.getpid(), os.getpid() + 1, os.getpid() + 2
    (tmp_path / "stat").write_text(
        f"cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 {TICK} {TICK} {TICK} 700 800 {TICK} {TICK} {TICK} 900 0\n"
        f"cpu1 {TICK} 0 0 0 0 0 0 0 0 0\ncpu7 {TICK} 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )
    for pid, parent, spent in ((own, 1, 3), (child, own, 2), (stranger, 1, 50)):
        (tmp_path / str(pid)).mkdir()
        times = f"{spent * TICK} {TICK} {TICK} 0"
        (tmp_path / f"{pid}/stat").write_text(f"{pid} (a) b) S {parent} {'0 ' * 9}{times} 20 0\n")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = reading()
    assert found is not None
    assert (found.busy_s, found.own_s, found.cores) == (7.0, 9.0, 2)
    monkeypatch.setattr(processes, "PROC", tmp_path / "none")
    assert reading() is None
    assert others.look() is None


def test_a_share_is_of_the_cores_and_without_this_process() -> None:
    began = Reading(at_s=10, busy_s=100, own_s=5, cores=2)
    assert share(began, Reading(at_s=20, busy_s=118, own_s=19, cores=2)) == 0.2
    # Clocks of ticks: what is not there is nothing, not less.
    assert share(began, Reading(at_s=20, busy_s=110, own_s=15.02, cores=2)) == 0
    assert share(began, began) is None
    assert share(None, began) is None


def test_what_descendants_took_is_own_also_when_their_parent_is_gone() -> None:
    before = reading()
    if before is None:
        return
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURNS.format(60)!r}])"
    with adopting():
        lost = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        while len(processes.family([lost.pid])) < 2 or _own() < before.own_s + 0.3:
            pass
        os.kill(lost.pid, signal.SIGKILL)
        lost.wait()
        os.killpg(lost.pid, signal.SIGKILL)
        while processes.seen(processes.family([os.getpid()])).processes > 1:
            pass
        wait_for_group(lost.pid)
    assert _own() >= before.own_s + 0.3
    with pytest.raises(ChildProcessError):
        os.waitpid(-lost.pid, os.WNOHANG)


def test_own_work_is_not_told_as_others() -> None:
    began = reading()
    if began is None:
        return
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    subprocess.run([sys.executable, "-c", BURNS.format(0.5)], check=True)
    assert _own() - began.own_s >= 0.9


@pytest.mark.parametrize(
    ("environment", "expected", "words"),
    [
        ({"others_before": 0.5, "others_meanwhile": 0.02, "load_before": 3.0}, True, "2 % mean"),
        ({"others_before": 0.0, "others_meanwhile": 0.3}, False, "30 % meanwhile"),
        ({"others_before": 0.3}, False, "30 % before measuring"),
        ({"others_before": None, "others_meanwhile": None, "load_before": 3.0, "load_after": 1.0},
         False, "Load before and after: 3.0, 1.0, by which it is judged"),
        ({"load_before": 0.5, "load_after": 2.0}, True, "Load before and after: 0.5, 2.0"),
        ({"load_before": 2.5}, False, "Load before: 2.5"),
        ({}, None, ""),
    ],
)  # fmt: skip
def test_quiet_is_judged_by_the_best_that_is_known(environment, expected, words: str) -> None:
    assert quiet(environment) is expected
    assert words in told(environment)
    assert bool(told(environment)) == bool(words)


def test_what_was_taken_meanwhile_is_told_after_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [Reading(0, 0, 0, 4), Reading(10, 12, 2, 4)]
    monkeypatch.setattr(others, "reading", lambda: readings.pop(0))
    monkeypatch.setattr(others, "look", lambda: 0.02)
    before = machine.before_measuring()
    after = machine.after_measuring(before)
    assert (after["others_before"], after["others_meanwhile"]) == (0.02, 0.25)
    assert set(after) == {*machine.environment(), "load_after", "others_before", "others_meanwhile"}
    # One that was told nothing before is as it was.
    assert set(machine.after_measuring({"load_before": 1})) == {"load_before", "load_after"}


def test_without_proc_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "reading", lambda: None)
    after = machine.after_measuring(machine.before_measuring())
    assert after["others_before"] is after["others_meanwhile"] is None


def _own() -> float:
    found = reading()
    return 0.0 if found is None else found.own_s
