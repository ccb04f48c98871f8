"""The machine that the service runs on: ports, disk, clock, threads, limits.

>>> ports(["127.0.0.1:3000"])
[Finding(about='port', state='ok', words='127.0.0.1:3000 is free', mend='')]
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from dermaflux.engines import usable_cores
from dermaflux.memory import gigabytes
from serving.doctor.finding import FAIL, NOTE, OK, Finding, planned
from serving.settings import Settings

ROOM: Final = 200_000_000
"""Bytes that each folder we write to should have free: uploads of 20 MB, ten at once."""
DRIFT: Final = 5.0
"""Seconds between our clock and that of a disk from which on it is told; a network's disk has a
clock of its own, and audit lines and signatures are dated by ours."""
LATEST: Final = 2100
"""A year that no clock should show yet."""
APPENDED: Final = ("head.json", "lock", "torn.jsonl", "pixels.sha256")
"""Files of the audit log and the marks that are written to as long as the service runs."""
FILES: Final = 1024
"""Open files that a process should be allowed: a socket per caller, and 64 requests at once."""


def ports(addresses: Iterable[str]) -> list[Finding]:
    """Whether one could listen at `host:port`."""
    found = []
    for address in addresses:
        host, _, number = address.rpartition(":")
        port = int(number) if number.isascii() and number.isdigit() else -1
        if not 0 < port < 65_536:
            words = f"{address!r} is no address; it needs HOST:PORT or PORT"
            found.append(Finding("port", FAIL, words))
            continue
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            # As servers do: what a former one left behind for a minute does not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]") or "127.0.0.1", port))
            except OSError as error:
                mend = f"ss -ltnp 'sport = :{port}', or choose another port"
                if error.errno == errno.EACCES:
                    mend = "choose a port above 1023"
                words = f"{address}: {error.strerror}"
                found.append(Finding("port", FAIL, words, mend))
            else:
                found.append(Finding("port", OK, f"{address} is free"))
    return found


def disks(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Every folder that is written to: there, writable, with room."""
    home = Path(environment.get("BENTOML_HOME") or Path.home() / "bentoml")
    places = {"BENTOML_HOME": home, "temporary files": Path(tempfile.gettempdir())}
    found = []
    for what, name in (("audit log", "audit"), ("marks", "marks")):
        place = planned(settings, name)
        if isinstance(place, Path):
            places[what] = place
            found += closed(place)
    for what, place in places.items():
        there = next(one for one in (place, *place.absolute().parents) if one.exists())
        if not there.is_dir():
            words = f"{there} is no folder, so there is no place for {what}"
            found.append(Finding("disk", FAIL, words, f"ls -l {there}"))
            continue
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            words = f"{place} ({what}) takes no files: {error.strerror}"
            mend = f"mount a volume there, or: chown {os.getuid()} {there}"
            found.append(Finding("disk", FAIL, words, mend))
            continue
        free = shutil.disk_usage(there).free
        words = f"{place} ({what}) has {gigabytes(free)} free"
        if free < ROOM:
            words = f"{words}, needs {gigabytes(ROOM)}"
            found.append(Finding("disk", FAIL, words, f"make room: du -xsh {there}/*"))
        else:
            found.append(Finding("disk", OK, words))
    return found


def closed(folder: Path) -> list[Finding]:
    """Files in a folder of records that this user may not append to: a start as another user, as
    root for one, leaves such behind."""
    try:
        files = [one for one in folder.iterdir() if one.is_file() and not os.access(one, os.W_OK)]
    except OSError:
        return []  # told of the folder
    # Files of keys are only read, and a log's older files may be kept from everybody.
    files = [one for one in sorted(files) if one.name in APPENDED]
    words = "this user may not write to it, and has to"
    mend = f"chown {os.getuid()} "
    return [Finding("disk", FAIL, f"{one}: {words}", f"{mend}{one}") for one in files]


def clock(made: datetime | None, now: datetime) -> list[Finding]:
    """Whether the clock can be right: after the bundle was made, together with the disk's, and
    its monotonic brother runs."""
    mend = "timedatectl set-ntp true, or set the clock: date -u -s ..."
    found = []
    if made is not None and now < made:
        words = f"it is {now:%Y-%m-%d %H:%M} UTC here, before the bundle was made ({made:%Y-%m-%d})"
        found.append(Finding("clock", FAIL, words, mend))
    elif now.year >= LATEST:
        found.append(Finding("clock", FAIL, f"the year is {now.year} here", mend))
    first = time.monotonic()
    with tempfile.NamedTemporaryFile() as stream:
        stream.write(b"now")
        stream.flush()
        apart = abs(os.stat(stream.name).st_mtime - time.time())
    if apart > DRIFT:
        words = f"files are dated {apart:.0f} seconds away from this machine's clock"
        found.append(Finding("clock", NOTE, words, mend))
    if time.monotonic() < first or not time.get_clock_info("monotonic").monotonic:
        words = "the clock that measures deadlines runs backwards"
        found.append(Finding("clock", FAIL, words, "restart the machine"))
    return found or [Finding("clock", OK, f"{now:%Y-%m-%d %H:%M} UTC, as files are dated")]


def moment(text: str) -> datetime | None:
    """A time of a bundle or a log; None where it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def threads(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Whether engines get the cores that there are, and not more."""
    cores, asked = usable_cores(), settings.threads
    found = []
    if asked is not None and asked > cores:
        words = f"{asked} threads on {cores} cores wait for each other"
        found.append(Finding("threads", NOTE, words, f"DERMAFLUX_THREADS={cores}"))
    limit = environment.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) < (asked or cores):
        words = f"OMP_NUM_THREADS={limit} may hold engines to fewer threads than {asked or cores}"
        found.append(Finding("threads", NOTE, words, "unset OMP_NUM_THREADS"))
    return found or [Finding("threads", OK, f"{asked or cores} on {cores} cores")]


def process() -> list[Finding]:
    """Who the process is, and how many files it may open."""
    import resource

    found = []
    if os.geteuid() == 0:
        words = "it runs as root, which it does not need"
        found.append(Finding("user", NOTE, words, "run it as a user of its own"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        words = f"{soft} open files are few; {FILES} are better"
        found.append(Finding("files", NOTE, words, f"ulimit -n {FILES}"))
    return found
