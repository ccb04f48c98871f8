"""Made pictures onto the disk: the file first, then the line that says it is there.

A picture's file is whole or absent, its line comes after it, and a batch's lines come together: a
kill at any moment loses what was not yet in a line, and that is drawn again, the same.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

from dermaflux.errors import DermaFluxError
from serving.batch.job import Folder
from serving.batch.journal import Entry, Journal
from serving.batch.maker import Made, Try

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(DermaFluxError):
    """The disk is full. What was written before is whole."""

    exit_status = 3


class Store:
    """Writes what a process made, in its folder and its journal."""

    def __init__(self, folder: Folder, journal: Journal) -> None:
        self._folder = folder
        self._journal = journal

    def write(self, made: Sequence[Made]) -> list[Entry]:
        """Pictures, then their entries.

        Raises:
            DiskFull: nothing of this batch stands in the journal.
            OSError: the disk is gone or takes no files; the same.
        """
        try:
            entries = [self._written(one) for one in made]
            self._journal.append(entries)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DiskFull(
                f"the disk of {self._folder.path} is full ({error.strerror}); all pictures written "
                "before are whole. Free space and run the same command again"
            ) from error
        return entries

    def _written(self, made: Made) -> Entry:
        item, attempt = made.one.item, made.one.attempt
        if made.error:
            return _entry(made.one, "failed", made.engine, reasons=(made.error,))
        kept = not made.verdict.reasons
        file = self._folder.kept(item) if kept else self._folder.rejected(item, attempt)
        self._folder.write(file, made.png)
        return _entry(
            made.one,
            "kept" if kept else "rejected",
            made.engine,
            reasons=made.verdict.reasons,
            file=file,
            size=len(made.png),
            sha256=hashlib.sha256(made.png).hexdigest(),
            pixels=made.pixels,
            measures=made.verdict.measures,
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
