"""What has been run: `runs.jsonl`, one line a run, appended and flushed to the disk.

    >>> with Journal(Path("runs/experiment")) as journal:
    ...     journal.append(line)
    >>> lines(Path("runs/experiment"))[key]["metrics"]["test"]["auc"]
    0.7931

A process that is killed loses the run that it was in. Its half line is cut off by the next.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dermaflux.errors import DatasetError
from training.experiment.key import Key

NAME: Final = "runs.jsonl"

Line = Mapping[str, Any]


def lines(folder: Path) -> dict[Key, Line]:
    """The finished runs by key; of a key that stands there twice, the last. A torn end is left out.

    Raises:
        DatasetError: a whole line is none of a run.
    """
    file = folder / NAME
    found: dict[Key, Line] = {}
    if not file.is_file():
        return found
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            found[Key.of(line["key"])] = line
        except (ValueError, TypeError, KeyError) as error:
            raise DatasetError(
                f"{file}, line {number} is no run ({type(error).__name__}: {error}); delete the "
                "line, and the run is made again"
            ) from error
    return found


class Journal:
    """`runs.jsonl`, open for appending; one process at a time.

    Raises:
        DatasetError: another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        self._new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / NAME
        self._stream = self._file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._stream.fileno()).st_nlink:
                raise BlockingIOError("the other process took its empty file away")
        except BlockingIOError as error:
            self._stream.close()
            raise DatasetError(
                f"{self._file} is being written by another process; wait for its end, or give "
                "another --out"
            ) from error
        self._stream.seek(0)
        whole = self._stream.read().rfind(b"\n") + 1
        self._stream.truncate(whole)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        # A refused experiment leaves nothing. Who opened the file meanwhile finds no link to it.
        if not self._stream.seek(0, os.SEEK_END):
            self._file.unlink(missing_ok=True)
            if self._new and not any(self._file.parent.iterdir()):
                self._file.parent.rmdir()
        self._stream.close()

    def append(self, line: Line) -> None:
        """Write a line and flush it to the disk.

        Raises:
            OSError: the disk is full; what was written of the line is taken back.
        """
        whole = self._stream.seek(0, os.SEEK_END)
        try:
            self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            os.ftruncate(self._stream.fileno(), whole)
            error.filename = str(self._file)
            raise
