"""What a job has done so far: lines that are appended, flushed to the disk, and never changed.

Every process of a job writes a journal of its own and reads all of them, so a job may be resumed,
and shared among machines anew, at any time. A line is written after its picture is there; a line
that a kill cut off is taken away when the journal is opened again. Files are the truth of pictures,
journals the truth of what was decided on them.

    >>> with Journal.open(folder, "1-of-3") as journal:
    ...     journal.append([entry])
    >>> ledger = read(folder)
    >>> ledger.kept["0000017"].sha256
    '8c1f...'
"""

from __future__ import annotations

import fcntl
import heapq
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dermaflux.errors import DatasetError

log = logging.getLogger(__name__)

STATES: Final = ("kept", "rejected", "failed")
_PREFIX: Final = "journal-"


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one try of one item.

    `state` is one of `STATES`; `reasons` say why not `kept`. `asked` is the item's digest. `file`
    is relative to the job's folder, and empty where a try failed. `size` in bytes and `sha256` are
    of the file, `pixels` of its uint8 [height, width, 3] before any marking. `engine` is the hash
    of what drew it; `measures` are the gate's, as JSON, for a mapping takes ten times the memory.
    `time` is UTC, ISO 8601.
    """

    name: str
    attempt: int
    state: str
    asked: str
    seed: int
    time: str
    engine: str
    reasons: tuple[str, ...] = ()
    file: str = ""
    size: int = 0
    sha256: str = ""
    pixels: str = ""
    measures: str = "{}"

    @classmethod
    def of(cls, line: bytes) -> Entry:
        """An entry of its line.

        Raises:
            ValueError: it is none.
        """
        try:
            content = json.loads(line)
        except RecursionError as error:
            raise ValueError(str(error)) from None
        if not isinstance(content, dict):
            raise ValueError("no object")
        reasons = content.get("reasons", [])
        if not isinstance(reasons, list) or not isinstance(content.get("measures", {}), dict):
            raise ValueError("reasons or measures of another type")
        measures = json.dumps(content.pop("measures", {}), ensure_ascii=False)
        try:
            entry = cls(**{**content, "reasons": tuple(reasons), "measures": measures})
        except TypeError as error:
            raise ValueError(str(error)) from None
        for name, kind in _KINDS.items():
            if type(getattr(entry, name)) is not kind:
                raise ValueError(f"{name} {getattr(entry, name)!r}")
        if entry.state not in STATES:
            raise ValueError(f"state {entry.state!r}")
        return entry

    def line(self) -> bytes:
        """The entry as a line of a journal, its end included."""
        values = {name: getattr(self, name) for name in _KINDS} | {"reasons": list(self.reasons)}
        text = json.dumps(values, ensure_ascii=False)
        return f'{text[:-1]}, "measures": {self.measures}}}\n'.encode()


_KINDS: Final = {
    "name": str, "attempt": int, "state": str, "asked": str, "seed": int, "time": str,
    "engine": str, "file": str, "size": int, "sha256": str, "pixels": str,
}  # fmt: skip


@dataclass
class Ledger:
    """All journals together, by the items' names; `rejected` by their tries too.

    Clocks of several machines differ, so what is kept stays kept whenever something failed.
    """

    kept: dict[str, Entry] = field(default_factory=dict)
    rejected: dict[str, dict[int, Entry]] = field(default_factory=dict)
    failed: dict[str, Entry] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Take an entry in. Of two on the same try the later holds, be it kept or rejected."""
        if entry.state == "kept":
            self.kept[entry.name] = entry
            self.rejected.get(entry.name, {}).pop(entry.attempt, None)
        elif entry.state == "rejected":
            self.rejected.setdefault(entry.name, {})[entry.attempt] = entry
            before = self.kept.get(entry.name)
            if before is not None and before.attempt == entry.attempt:
                del self.kept[entry.name]
        else:
            self.failed[entry.name] = entry

    def forget(self, entry: Entry) -> None:
        """Take an entry out: its picture is gone."""
        if entry.state == "kept":
            self.kept.pop(entry.name, None)
        else:
            self.rejected.get(entry.name, {}).pop(entry.attempt, None)

    def next_attempt(self, name: str, attempts: int) -> int | None:
        """The try that an item still needs, from 0, or None where it is settled.

        What failed is to be tried again.
        """
        if name in self.kept:
            return None
        done = self.rejected.get(name, {})
        return next((one for one in range(attempts) if one not in done), None)

    def has_failed(self, name: str, attempts: int) -> bool:
        """Whether an item's last word is a failure: it still needs a try, and had one."""
        return name in self.failed and self.next_attempt(name, attempts) is not None


def read(folder: Path) -> Ledger:
    """What all journals of a folder say together, in the order of their entries' times.

    Raises:
        DatasetError: a journal cannot be read.
    """
    ledger = Ledger()
    files = sorted(folder.glob(f"{_PREFIX}*.jsonl"))
    # Each journal is in the order of its own clock, so they are merged line by line.
    for entry in heapq.merge(*map(_entries, files), key=lambda entry: entry.time):
        ledger.add(entry)
    return ledger


def unlocked(folder: Path) -> list[str]:
    """Names of the shares whose journals nobody writes now."""
    names = []
    for file in sorted(folder.glob(f"{_PREFIX}*.jsonl")):
        with file.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            names.append(file.stem.removeprefix(_PREFIX))
    return names


class Journal:
    """The journal that this process writes. No other process may have it open for writing."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    @classmethod
    def open(cls, folder: Path, name: str) -> Journal:
        """Open the journal of a share of the job, and cut off what a kill left of a last line.

        Raises:
            DatasetError: another process writes it, or it cannot be opened.
        """
        path = folder / f"{_PREFIX}{name}.jsonl"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise DatasetError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            _lock(descriptor, path)
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                log.info("%s: the last line was cut off, and is taken away", path)
                os.ftruncate(descriptor, whole)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, path)

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries and flush them to the disk: all of them, or none.

        Raises:
            OSError: the disk is full or gone; the journal is as it was.
        """
        data = b"".join(entry.line() for entry in entries)
        size = os.fstat(self._descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def close(self) -> None:
        """Let others write it."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DatasetError(
            f"{path} is being written by another process: the same share of this job runs "
            "already; wait for it or stop it"
        ) from None
    except OSError as error:
        # Some network disks have no locks. Two processes on a share draw the same pictures twice.
        log.warning("%s cannot be locked (%s); do not run this share twice", path, error.strerror)


def _entries(file: Path) -> Iterator[Entry]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return  # a kill cut it off, or another process is at it now
                try:
                    yield Entry.of(line)
                except ValueError as error:
                    log.warning("%s, line %d is damaged (%s): drawn again", file, number, error)
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
