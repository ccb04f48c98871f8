"""Made pictures onto the disk: the file first, then the line that says it is there.

A picture's file is whole or absent, its line comes after it, and a batch's lines come together: a
kill at any moment loses what was not yet in a line, and that is drawn again, the same.
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
from serving.batch.job import Folder
from serving.batch.journal import Entry, Journal
from serving.batch.maker import Made, Try

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
    except (OSError, DatasetError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _FULL:
            raise
        raise DiskFull(
            f"the disk of {path} is full ({cause.strerror}); all that was written before is whole. "
            "Free space and run the same command again"
        ) from error


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
        with stopping_when_full(self._folder.path):
            entries = [self._written(one) for one in made]
            self._journal.append(entries)
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
