"""Ray's own process, from outside: started, asked to draw, and ended; or why there is none.

Ray takes the process that joins a cluster for its own: it handles its signals, leaves threads in it
after the cluster is left, and ends it when it is asked at the wrong time. So it has one to itself,
`serving.batch.driver`, at the other end of a pair of sockets; this one never imports Ray. That
process, and a cluster that it began, end when this one closes its socket, however it ends.

>>> with joined(settings) as driver:
...     drawn = [pickle.loads(data) for data in driver.draw(tools, tries, batch=8, lost=4)]
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Final

from dermaflux.errors import EngineError
from serving.batch.maker import Tools, Try
from serving.batch.settings import LOCAL, Settings

log = logging.getLogger(__name__)

_COMMAND: Final = (sys.executable, "-m", "serving.batch.driver")
_SECONDS: Final = 10.0  # for the head of a cluster to answer at all
_LEAVING: Final = 30.0
"""Seconds to leave a cluster; then the process is killed, and a cluster that it began with it."""
_SENT: Final = 1000
"""Tries that are sent together: of a million, this process need not hold all twice."""
_AUTO: Final = "auto"
"""Ray's own word: the cluster of `RAY_ADDRESS`, else the one that this machine is a node of."""
_EXAMPLE: Final = "10.0.0.1:6379"


@dataclass(frozen=True)
class Blocks:
    """Asks Ray's process to draw the tries that were sent before; see `Driver.draw`."""

    tools: Tools
    batch: int
    lost: int


@dataclass(frozen=True)
class Failure:
    """What Ray's process says in place of an answer.

    `deaths` says that more blocks were lost than might be; `trace` is that of an error of ours.
    """

    words: str
    deaths: bool = False
    trace: str = ""


class BlocksLost(EngineError):
    """Processes of the cluster died again and again; what came back before is good."""


class DriverDied(EngineError):
    """Ray's own process ended by itself; what came back before is good."""


class Driver:
    """Ray's process, joined to a cluster."""

    def __init__(self, process: subprocess.Popen[bytes], ends: Connection) -> None:
        self._process = process
        self._ends = ends

    def join(self, settings: Settings) -> None:
        """Join the cluster of `settings`.

        Raises:
            EngineError: it cannot be joined.
            DriverDied: see there.
        """
        self._say(settings)
        answer = self._answer()
        if isinstance(answer, Failure):
            raise _none(settings, answer.words)

    def draw(self, tools: Tools, tries: Sequence[Try], batch: int, lost: int) -> Iterator[bytes]:
        """What comes back of blocks of `batch` tries, each a pickled `serving.batch.actor.Drawn`.

        `lost` blocks may not come back, since their processes died; -1 for any number.

        Raises:
            BlocksLost: more were lost.
            EngineError: no actor can start, or the cluster ended.
            DriverDied: see there.
        """
        for first in range(0, len(tries), _SENT):
            # As bytes, so that an item that ends who reads it ends no process but an actor's.
            self._say([pickle.dumps(one) for one in tries[first : first + _SENT]])
        self._say(Blocks(tools, batch, lost))
        while isinstance(answer := self._answer(), bytes):
            yield answer
        if answer is None:
            return
        if answer.deaths:
            raise BlocksLost(answer.words)
        if answer.trace:
            log.error("an error in Ray's own process:\n%s", answer.trace)
        raise EngineError(
            f"the cluster cannot draw: {answer.words}. What came back before is written; "
            "mend that and run the same command again"
        )

    def leave(self) -> None:
        """End the process: it leaves the cluster by itself, or is killed."""
        self._ends.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LEAVING)
        finally:
            self._process.kill()
            self._process.wait()

    def _say(self, words: object) -> None:
        try:
            self._ends.send(words)
        except OSError as error:
            raise self._death() from error

    def _answer(self) -> bytes | Failure | None:
        try:
            answer: bytes | Failure | None = self._ends.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        return answer

    def _death(self) -> DriverDied:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS)
        status = self._process.returncode
        how = "closed its connection"
        if status is not None:
            name = signal.Signals(-status).name if status < 0 else ""
            how = f"ended by signal {-status} ({name})" if name else f"ended with status {status}"
        return DriverDied(
            f"Ray's own process {how}; what came back before is written; run the same command again"
        )


def reachable(settings: Settings) -> None:
    """Check, before anything is written, that the cluster of `--ray` can be joined.

    Without `--ray` there is nothing to check.

    Raises:
        EngineError: Ray is not installed, the address is none, or no cluster answers there.
    """
    if settings.ray is None:
        return
    _check(settings)
    if settings.ray != LOCAL:
        with joined(settings):
            pass


@contextmanager
def joined(settings: Settings) -> Iterator[Driver]:
    """A process of Ray's, joined to the cluster. It has ended when the block has.

    Raises:
        EngineError: see `reachable`.
        DriverDied: see there.
    """
    _check(settings)
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [*_COMMAND, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # Ctrl-C is for this process, which then ends that one.
            start_new_session=True,
        )
    driver = Driver(process, ours)
    try:
        driver.join(settings)
        yield driver
    finally:
        driver.leave()


def told(trace: str) -> str:
    """The last line of a trace, without the name of its error's class."""
    last = trace.strip().splitlines()[-1].strip()
    return re.sub(r"^[A-Za-z_][\w.]*\.[\w.]*Error: ", "", last)


def _check(settings: Settings) -> None:
    if importlib.util.find_spec("ray") is None:
        raise EngineError("--ray needs Ray, which is not installed; pip install 'ray[data]'")
    address = str(settings.ray)
    if address == _AUTO:
        address = os.environ.get("RAY_ADDRESS") or _AUTO
    if "://" in address:  # Ray Data does not run over Ray Client
        raise EngineError(
            f"--ray {address}: only the cluster itself can be joined, not its client or job server;"
            f" run this on a machine of the cluster with --ray {_AUTO}, or give the head's own "
            f"address, such as {_EXAMPLE}"
        )
    if address not in (LOCAL, _AUTO):
        try:
            _reach(address)
        except (OSError, ValueError) as error:
            raise _none(settings, str(error) or type(error).__name__) from error


def _none(settings: Settings, words: str) -> EngineError:
    said = words.strip().splitlines()[0].rstrip(".")
    return EngineError(
        f"no Ray cluster at {settings.ray}: {said}; give the address of its head, "
        f"such as {_EXAMPLE} (and set RAY_AUTH_MODE=token where it asks for a token), or --ray "
        "alone for a cluster on this machine"
    )


def _reach(address: str) -> None:
    """Ray itself tries for many minutes, and says nothing.

    Raises:
        OSError: nobody answers there.
        ValueError: it is no address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("that is no HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
