"""What other processes took of the machine: whether it was quiet, which its load does not tell.

The load average of a minute still holds the command before this one, and this one itself. What
counts is the time that the cores were busy (Linux' /proc/stat, with what a hypervisor gave to
others) less what this process and all that it started took of them, as a share of the cores that
it may use:

    >>> began = reading()
    >>> measure()
    >>> share(began, reading())
    0.02

Processes that end without being waited for by who started them would be counted as others; who ends
a group of processes waits for them here (`adopting`, `wait_for_group`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import processes

MOST: Final = 0.1
"""Share of the cores over which others disturb: of two, a fifth of one. What a system does of its
own takes a hundredth or two."""
_LOOK_SECONDS: Final = 0.5
_BUSY: Final = (0, 1, 2, 5, 6, 7)
"""Columns of /proc/stat: user, nice, system, irq, softirq, steal; what waits (idle, iowait) is not
busy, and guests are in user and nice already."""
_SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER of Linux' prctl."""


@dataclass(frozen=True)
class Reading:
    """At one moment, of a clock without a beginning: seconds, busy seconds over `cores`, and the
    seconds that this process and its descendants took."""

    at_s: float
    busy_s: float
    own_s: float
    cores: int


def reading() -> Reading | None:
    """Where things stand now; None where the system does not tell (macOS has no /proc)."""
    try:
        lines = (processes.PROC / "stat").read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, ValueError, AttributeError):
        return None
    cores = [line.split() for line in lines if line.partition(" ")[0] in allowed]
    busy = sum(int(core[1 + column]) for core in cores for column in _BUSY if len(core) > 8)
    own = sum(map(_spent, processes.family([os.getpid()])))
    return Reading(time.monotonic(), busy / tick, own / tick, len(cores)) if cores else None


def share(began: Reading | None, ended: Reading | None) -> float | None:
    """The part of the cores that others took between two readings, 0 to 1; None if unknown."""
    if began is None or ended is None or ended.at_s <= began.at_s:
        return None
    others = (ended.busy_s - began.busy_s) - (ended.own_s - began.own_s)
    return round(min(max(others / (ended.at_s - began.at_s) / ended.cores, 0.0), 1.0), 3)


def look(seconds: float = _LOOK_SECONDS) -> float | None:
    """`share` of the next half second, in which this process waits; None if unknown."""
    began = reading()
    if began is None:
        return None
    time.sleep(seconds)
    return share(began, reading())


def quiet(environment: Mapping[str, Any]) -> bool | None:
    """Whether a result's machine was: by what others took while it was measured, if that is known,
    else just before, else by the load before (results of old, systems without /proc); None if
    nothing is known."""
    for name in ("others_meanwhile", "others_before"):
        if environment.get(name) is not None:
            return bool(environment[name] <= MOST)
    load = environment.get("load_before")
    return None if load is None else bool(load <= 1)


def told(environment: Mapping[str, Any]) -> str:
    """By which `quiet` judges, in a few words; empty if nothing is known."""
    names = {"others_before": "before measuring", "others_meanwhile": "meanwhile"}
    took = [f"{100 * environment[name]:.0f} % {when}" for name, when in names.items()
            if environment.get(name) is not None]  # fmt: skip
    if took:
        return f"Of the cores, other processes took {', '.join(took)}"
    load = [environment.get(name) for name in ("load_before", "load_after")]
    if load[0] is None:
        return ""
    words = f"Load before and after: {load[0]}, {load[1]}"
    if load[1] is None:
        words = f"Load before: {load[0]}"
    if "others_before" not in environment:
        return words
    return f"{words}, by which it is judged: this system does not tell what others took"


@contextmanager
def adopting() -> Iterator[None]:
    """Meanwhile, descendants whose parent ends are this process's children (Linux alone)."""
    control = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    if control is not None:
        control(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        if control is not None:
            control(_SUBREAPER, 0, 0, 0, 0)


def wait_for_group(group: int) -> None:
    """Take in the ended children of a process group: what they took is this process's own then."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def _spent(pid: int) -> int:
    """Ticks of a process, and of its children that ended and were waited for."""
    try:
        stat = (processes.PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(word) for word in stat[11:15])
