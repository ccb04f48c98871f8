"""The log as it is written: lines appended one behind the other, by several threads and processes.

Whoever appends holds the folder's lock, sees whether others wrote meanwhile, writes all that waits
in one go and, as `fsync` says, waits for the disk. What goes wrong is never silent: half a line
that a kill left is kept in `torn.jsonl` and noted by a line, lines that are gone although the head
knows them are noted too, and so are events that could not be written.

    >>> log = AuditLog.open(Path("audit"), Path("keys/audit.key"), Rules(required=True))
    >>> log.append(Event(caller="ward3", route="/v1/classify", outcome="done", status=200))
    >>> log.close()

Anchors, the number and hash of a line, go to the service's own log: copy those elsewhere (that is
what log collectors do), and a log that was cut off or written anew does not fit them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypeVar

from serving.audit import ending
from serving.audit.ending import HEAD, Head, file_of, files_of, number_of, put_aside
from serving.audit.record import ZERO, Event, line_hash, sealed, stamp
from serving.audit.secret import AuditError, Secrets
from serving.audit.turn import Turn, named

logger = logging.getLogger(__name__)

Read = TypeVar("Read")
Fsync = Literal["always", "second", "never"]
FSYNC: Final = ("always", "second", "never")
ROOM: Final = 1_000_000
"""Bytes that the disk needs to have free for `check`: some thousand lines."""


@dataclass(frozen=True)
class Rules:
    """How a log is kept.

    `required`: what cannot be recorded is not done: `append` raises, and the service answers 503.
    Without it the event is lost, an error is logged, and the next line that can be written says how
    many were. `fsync`: wait for the disk before every answer (`always`: nothing that was answered
    is lost to a power failure), at most once a second, or leave it to the system (a kill of the
    process loses nothing even so). A file is followed by the next one above `rotate_bytes`. An
    anchor is logged after as many lines or seconds, with the next line.
    """

    required: bool = True
    fsync: Fsync = "second"
    rotate_bytes: int = 64_000_000
    anchor_lines: int = 1_000
    anchor_seconds: float = 600.0


@dataclass
class _Waiting:
    """Events of one caller of `append`, and what became of them."""

    events: Sequence[Event]
    done: bool = False
    error: OSError | AuditError | None = None


@dataclass
class _Gap:
    """What could not be written since when."""

    lost: int = 0
    since: str = ""


class AuditLog:
    """An open log. Threads may share it; every process opens one of its own."""

    def __init__(
        self,
        folder: Path,
        secrets: Secrets,
        key: Path,
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._secrets = secrets
        self._key = key
        self._rules = rules
        self._clock = clock
        self._turn = Turn(folder)
        self._head = -1
        self._descriptor = -1
        self._path = folder
        self._size, self._n, self._hash = 0, 0, ZERO
        self._waiting: list[_Waiting] = []
        self._mutex = threading.Lock()
        self._writing = threading.Lock()
        self._gap = _Gap()
        self._synced = self._anchored_at = clock()
        self._anchored = 0

    @classmethod
    def open(
        cls,
        folder: Path,
        key: Path,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open a log, or begin one: folder and key are made where there are none yet.

        Raises:
            AuditError: the folder takes no files, a log is there without its key, or its last line
                is none of ours.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o750)
            begun = bool(files_of(folder)) or (folder / HEAD).exists()
            if not begun:
                key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            secrets = Secrets.open(key, make=not begun)
            log = cls(folder, secrets, key, rules or Rules(), clock)
            try:
                # What was left behind is mended now, not with the first request.
                log._write([])
            except (OSError, AuditError):
                log._release()
                raise
        except OSError as error:
            raise AuditError(
                f"the audit log {folder} cannot be opened: {error}; name a folder that the service "
                "may write to"
            ) from error
        log.anchor()
        return log

    def append(self, *events: Event) -> None:
        """Record events, in this order and in one go; they are in the log when this returns.

        Calls of other threads that come meanwhile are written, and flushed, together.

        Raises:
            AuditError: they are not in the log, where it is `required`.
        """
        mine = _Waiting(events)
        with self._mutex:
            self._waiting.append(mine)
        with self._writing:
            if not mine.done:
                with self._mutex:
                    batch, self._waiting = self._waiting, []
                self._settle(batch)
        if mine.error is not None and self._rules.required:
            raise AuditError(
                f"the audit log {self.folder} cannot be written ({mine.error}), and nothing is "
                "done without it; make room on its disk, or see to its permissions"
            ) from mine.error

    def check(self) -> None:
        """Ask before the work is done, so that none is done in vain, whether it can be recorded.

        Raises:
            AuditError: the log is `required`, and its disk is full or its folder gone.
        """
        if not self._rules.required:
            return
        try:
            disk = os.statvfs(self.folder)
        except OSError as error:
            raise AuditError(f"the audit log {self.folder} is gone: {error.strerror}") from error
        if disk.f_bavail * disk.f_frsize < ROOM:
            raise AuditError(
                f"the disk of the audit log {self.folder} is full, and nothing is done without it; "
                "make room, or keep its older files elsewhere"
            )

    def anchor(self) -> None:
        """Log the number and hash of the last line, from which on no line can be cut unseen."""
        logger.info("audit anchor %d:%s in %s", self._n, self._hash, self._path.name)
        self._anchored, self._anchored_at = self._n, self._clock()

    def close(self) -> None:
        """Flush to the disk, unless that is left to the system; log an anchor, let the files go."""
        with self._writing:
            if self._descriptor >= 0:
                with contextlib.suppress(OSError):
                    if self._rules.fsync != "never":
                        os.fsync(self._descriptor)
                self.anchor()
            self._release()

    def _release(self) -> None:
        self._turn.close()
        for name in ("_descriptor", "_head"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def _settle(self, batch: Sequence[_Waiting]) -> None:
        """Write what waits; whoever waits learns what became of it."""
        error: OSError | AuditError | None = None
        events = [event for waiting in batch for event in waiting.events]
        try:
            self._write(events)
        except (OSError, AuditError) as found:
            error = found
            if not self._gap.lost:
                self._gap.since = stamp()
            self._gap.lost += len(events)
            logger.error("audit: %d events not recorded: %s", len(events), found)
        for waiting in batch:
            waiting.done, waiting.error = True, error

    def _write(self, events: Sequence[Event]) -> None:
        with self._turn.taken():
            # Put back from a backup, the head is another file than the one that was opened.
            self._head = named(self._head, self.folder / HEAD)
            notes = self._arrive()
            if self._gap.lost:
                note: dict[str, str | int] = {"lost": self._gap.lost, "since": self._gap.since}
                notes.append(Event(event="gap", note=note))
            if not notes and not events:
                return
            if self._size >= self._rules.rotate_bytes:
                self._next_file()
            if not self._size and self._n and "missing" not in [note.event for note in notes]:
                # So that a file whose beginning was cut off is told from one that goes on.
                notes.insert(0, Event(event="continued"))
            n, hashed, lines, now = self._n, self._hash, bytearray(), stamp()
            for event in (*notes, *events):
                line = sealed(event, n=n + 1, prev=hashed, time=now, secret=self._secrets.current)
                n, hashed = n + 1, line_hash(line)
                lines += line
            self._put(bytes(lines))
            self._n, self._hash, self._size = n, hashed, self._size + len(lines)
            self._gap = _Gap()
            self._tell(Head(n, hashed, number_of(self._path)))
        late = self._clock() - self._anchored_at >= self._rules.anchor_seconds
        if late or self._n - self._anchored >= self._rules.anchor_lines:
            self.anchor()

    def _put(self, data: bytes) -> None:
        """All of the bytes, or none: what was written of them before an error is taken back."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            now = self._clock()
            wait = 0.0 if self._rules.fsync == "always" else 1.0
            if self._rules.fsync != "never" and now - self._synced >= wait:
                os.fsync(self._descriptor)
                self._synced = now
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise

    def _tell(self, head: Head) -> None:
        """Write the head. The lines are there by now, so an error of the disk undoes nothing."""
        try:
            os.pwrite(self._head, ending.head_bytes(head, self._secrets.current), 0)
        except OSError as error:
            logger.error("audit: %s is not up to date: %s", self.folder / HEAD, error)

    def _arrive(self) -> list[Event]:
        """Be at the end of the log, wherever others left it; what is to be noted of it."""
        if self._descriptor >= 0 and not file_of(self.folder, number_of(self._path) + 1).exists():
            here = os.fstat(self._descriptor)
            if here.st_nlink and here.st_size == self._size:
                return []
        return self._reach()

    def _reach(self) -> list[Event]:
        found, head, notes = files_of(self.folder), None, []
        try:
            if os.fstat(self._head).st_size:
                head = self._known(lambda: ending.read_head(self.folder, self._secrets))
        except AuditError as error:
            logger.error("audit: %s", error)
            notes.append(Event(event="head-damaged"))
        # Files that were moved away keep their names for themselves.
        path = found[-1] if found else file_of(self.folder, head.file + 1 if head else 1)
        self._take(path)
        end = self._known(lambda: ending.last_line(path, self._secrets))
        if end.torn:
            put_aside(self.folder, path, end)
            os.ftruncate(self._descriptor, end.size)
            logger.error("audit: half a line of %s is kept in %s", path.name, ending.TORN)
            notes.append(Event(event="mended", note={"bytes": len(end.torn), "after": end.n}))
        self._size = end.size
        if not end.n and len(found) > 1:  # a kill came between a new file and its first line
            end = self._known(lambda: ending.last_line(found[-2], self._secrets))
        self._n, self._hash = end.n, end.hash
        if head is not None:
            return [*self._behind(head), *notes]
        if not self._n:
            return [*notes, Event(event="begun")]
        if not notes or notes[0].event != "head-damaged":
            logger.error("audit: %s is gone; lines may be, too", self.folder / HEAD)
            notes.insert(0, Event(event="head-gone", note={"after": self._n}))
        return notes

    def _known(self, read: Callable[[], Read]) -> Read:
        """What was read; once more, where others began to seal with a new key meanwhile."""
        try:
            return read()
        except AuditError:
            self._secrets = Secrets.open(self._key)
            return read()

    def _behind(self, head: Head) -> list[Event]:
        """Go on behind what the head knows, where the lines themselves end before it."""
        if head.n < self._n or head.hash == self._hash:
            return []
        if head.n == self._n:
            logger.error("audit: line %d is not the one that was written", head.n)
            return [Event(event="replaced", note={"line": head.n})]
        missing = {"from": self._n + 1, "to": head.n}
        logger.error("audit: lines %(from)d to %(to)d are gone from the log", missing)
        self._n, self._hash = head.n, head.hash
        return [Event(event="missing", note=missing)]

    def _next_file(self) -> None:
        if self._rules.fsync != "never":
            os.fsync(self._descriptor)
        # So that a file in an archive can be verified by itself, to its last line.
        self.anchor()
        self._take(file_of(self.folder, number_of(self._path) + 1))
        self._size = 0

    def _take(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._path = descriptor, path
