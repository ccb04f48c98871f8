"""A server that is measured: started as a process of its own, asked once it is ready, ended after.

Its memory and processor time are those of the process and of all that it started, read from Linux'
/proc. One that ends while it starts is an error with its last words.

    >>> with started(Side("fastapi", command, {}, "/health"), folder / "log") as running:
    ...     settle(running)
    ...     running.url, running.cpu_s(), running.rss_bytes()
    ('http://127.0.0.1:40321', 9.1, 812646400)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import others, processes
from dermaflux.errors import DermaFluxError

HOST: Final = "127.0.0.1"
PORT: Final = "{port}"
"""Stands in a command for the port that is chosen when it starts."""
START_SECONDS: Final = 180.0
END_SECONDS: Final = 30.0
_ASK_SECONDS: Final = 0.1
_QUIET: Final = 0.2
"""Share of one core under which a server counts as idle; a loop that polls takes some."""
_LOOK_SECONDS: Final = 0.5
_LAST_WORDS: Final = 1500
_TICK: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Side:
    """A server: its command with `{port}` in it, more variables, and a path that answers 200 once
    it can do its work."""

    name: str
    command: tuple[str, ...]
    variables: Mapping[str, str]
    ready: str


@dataclass
class Running:
    """A side that is ready."""

    url: str
    pid: int
    start_s: float
    peak_rss_bytes: int = field(default=0, init=False)

    def rss_bytes(self) -> int:
        """Resident now, each process's own and shared pages alike."""
        now = processes.seen(processes.family([self.pid])).rss_bytes
        self.peak_rss_bytes = max(self.peak_rss_bytes, now)
        return now

    def cpu_s(self) -> float:
        """Processor seconds so far, over all cores, of the processes that live."""
        ticks = 0
        for pid in processes.family([self.pid]):
            with contextlib.suppress(OSError):
                stat = (processes.PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
                ticks += int(stat[11]) + int(stat[12])
        return ticks / _TICK


def free_port(wanted: int | None = None) -> int:
    """A port of this machine that nobody listens on: `wanted`, or any.

    Raises:
        DermaFluxError: somebody listens on the wanted one.
    """
    with socket.socket() as listener:
        # As servers do it: connections of the last one that still end are not in the way.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, wanted or 0))
        except OSError as error:
            raise DermaFluxError(
                f"port {wanted} of {HOST} cannot be listened on ({error.strerror}); use another "
                "--port, or leave it out to take a free one"
            ) from error
        return int(listener.getsockname()[1])


@contextmanager
def started(side: Side, log: Path, port: int | None = None) -> Iterator[Running]:
    """The side while it runs, from when it is ready; `log` takes all that it says.

    Raises:
        DermaFluxError: the port is taken, its program cannot be started, it ended while it started
            or is not ready after three minutes.
    """
    number = free_port(port)
    command = [word.replace(PORT, str(number)) for word in side.command]
    begin = time.monotonic()
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command, env={**os.environ, **side.variables}, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise DermaFluxError(f"{side.name}: {command[0]} cannot be run: {error}") from error
    url = f"http://{HOST}:{number}"
    with others.adopting():
        try:
            _wait(side, process, f"{url}{side.ready}", log)
            yield Running(url, process.pid, time.monotonic() - begin)
        finally:
            _end(process)


def settle(running: Running, seconds: float = 20.0) -> None:
    """Wait until it is idle, `seconds` at most: some go on preparing after they are ready."""
    end = time.monotonic() + seconds
    before = running.cpu_s()
    while time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        now = running.cpu_s()
        if now - before < _QUIET * _LOOK_SECONDS:
            return
        before = now


@contextmanager
def watched(running: Running, seconds: float = 0.5) -> Iterator[None]:
    """Look at its memory now and then, so that `peak_rss_bytes` is what it had at most."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(seconds):
            running.rss_bytes()

    thread = threading.Thread(target=look, name="memory", daemon=True)
    running.rss_bytes()
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        running.rss_bytes()


def _wait(side: Side, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with opener.open(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            raise DermaFluxError(
                f"{side.name} ended with status {process.returncode} before it was ready; its last "
                f"words:\n{_last_words(log)}"
            )
        if time.monotonic() > end:
            raise DermaFluxError(
                f"{side.name} is not ready after {START_SECONDS:g} s ({url}); its last words:\n"
                f"{_last_words(log)}"
            )
        time.sleep(_ASK_SECONDS)


def _last_words(log: Path) -> str:
    text = log.read_text("utf-8", "replace")
    return text[-_LAST_WORDS:].strip() or "(it said nothing)"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it started and left: it has a session, so a group, of its own. What those
    took of the machine is ours, not others', once they were waited for."""
    members = processes.family([process.pid])
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The next side is to have the machine alone.
    end = time.monotonic() + END_SECONDS
    while processes.seen(members).processes and time.monotonic() < end:
        time.sleep(_ASK_SECONDS)
    others.wait_for_group(process.pid)
