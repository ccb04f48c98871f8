"""A service's processes seen from outside, through Linux' /proc: memory, open files, threads.

They are found by the port that they listen on, with all that they started, so nothing has to be
known of how the service is built or who started it.

    >>> seen(family(listening(3000)))
    Seen(processes=4, rss_bytes=612368384, open_files=183, threads=41)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dermaflux.errors import DermaFluxError

PROC: Final = Path("/proc")
_LISTENING: Final = "0A"
"""TCP_LISTEN in /proc/net/tcp."""


@dataclass(frozen=True)
class Seen:
    """Sums over processes at one moment.

    Memory is what is resident of each (VmRSS), so pages that they share count in each: it is for
    comparing a service with itself.
    """

    processes: int
    rss_bytes: int
    open_files: int
    threads: int


def listening(port: int) -> list[int]:
    """The processes that hold a socket listening on a TCP port of this machine, ascending.

    Raises:
        DermaFluxError: none is seen.
    """
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{columns[9]}]")
    found = [pid for pid in _pids() if sockets & _open(pid)]
    if not sockets or not found:
        raise DermaFluxError(
            f"no process of this machine is seen to listen on port {port}; run this on the "
            "service's machine, as its user or as root, or name its first process with --pid"
        )
    return sorted(found)


def family(roots: Iterable[int]) -> list[int]:
    """These processes and all that descend from them, as far as they live, ascending."""
    children: dict[int, list[int]] = {}
    alive = _pids()
    for pid in alive:
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in brackets may hold anything; the parent is the second word behind it.
            stat = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(stat[1]), []).append(pid)
    found: set[int] = set()
    wanted = [pid for pid in roots if pid in alive]
    while wanted:
        pid = wanted.pop()
        if pid not in found:
            found.add(pid)
            wanted += children.get(pid, [])
    return sorted(found)


def seen(pids: Iterable[int]) -> Seen:
    """What these hold now; one that has just ended counts as nothing."""
    count = rss = files = threads = 0
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "status").read_text().splitlines()
        except OSError:
            continue
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmRSS" not in values:  # it has ended, and nobody has asked how
            continue
        count += 1
        rss += int(values["VmRSS"].split()[0]) * 1024
        threads += int(values["Threads"])
        files += len(_open(pid))
    return Seen(count, rss, files, threads)


def _pids() -> set[int]:
    return {int(path.name) for path in PROC.iterdir() if path.name.isdecimal()}


def _open(pid: int) -> set[str]:
    """What its descriptors lead to, descriptors that lead to the same apart by their number."""
    found = set()
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(link.readlink())
                found.add(target if target.startswith("socket:") else f"{link.name} {target}")
    return found
