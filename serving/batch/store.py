"""Made pictures onto the disk: the file first, then the line that says it is there.

A picture's file is whole or absent, its line comes after it, and a batch's lines come together: a
kill at any moment loses what was not yet in a line, and that is drawn again, the same. With a
marker every file is signed, and its pixels are registered before its line: a picture that was drawn
again is signed again, so files of two runs are equal apart from time and signature.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dermaflux.errors import DatasetError, DermaFluxError
from dermaflux.marks import Marker
from dermaflux.marks.registry import RegistryError
from serving.batch.job import Folder
from serving.batch.journal import Entry, Journal
from serving.batch.maker import Made, Try
from serving.batch.marked import signed

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(DermaFluxError):
    """The disk is full. What was written before is whole."""

    exit_status = 3


@contextmanager
def stopping_when_full(path: Path) -> Iterator[None]:
    """What the system says of a full disk, also where it was put into our words, is `DiskFull`.

    Raises:
        DiskFull: with what to do.
    """
    try:
        yield
    except (OSError, DatasetError, RegistryError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _FULL:
            raise
        raise DiskFull(
            f"the disk of {path} is full ({cause.strerror}); all that was written before is whole. "
            "Free space and run the same command again"
        ) from error


class Store:
    """Writes what a process made, in its folder and its journal; with a `marker`, signed."""

    def __init__(self, folder: Folder, journal: Journal, marker: Marker | None = None) -> None:
        self._folder = folder
        self._journal = journal
        self._marker = marker

    def write(self, made: Sequence[Made]) -> list[Entry]:
        """Pictures, then their entries.

        Raises:
            DiskFull: nothing of this batch stands in the journal.
            OSError: the disk is gone or takes no files; the same.
            MarksError, RegistryError: they cannot be signed or registered; the same.
        """
        with stopping_when_full(self._folder.path):
            entries = [self._written(one) for one in made]
            if self._marker is not None:
                self._marker.registry.add(
                    *dict.fromkeys(one.pixels for one in entries if one.pixels)
                )
            self._journal.append(entries)
        return entries

    def _written(self, made: Made) -> Entry:
        item, attempt = made.one.item, made.one.attempt
        if made.error:
            return _entry(made.one, "failed", made.engine, reasons=(made.error,))
        kept = not made.verdict.reasons
        file = self._folder.kept(item) if kept else self._folder.rejected(item, attempt)
        data = made.png if self._marker is None else signed(self._marker, made)
        self._folder.write(file, data)
        return _entry(
            made.one,
            "kept" if kept else "rejected",
            made.engine,
            reasons=made.verdict.reasons,
            file=file,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            pixels=made.pixels,
            measures=json.dumps(made.verdict.measures, ensure_ascii=False),
        )


def _entry(one: Try, state: str, engine: str, **rest: object) -> Entry:
    return Entry(
        name=one.item.name,
        attempt=one.attempt,
        state=state,
        asked=one.item.digest,
        seed=one.request.seed,
        time=datetime.now(UTC).isoformat(timespec="microseconds"),
        engine=engine,
        **rest,  # type: ignore[arg-type]
    )
