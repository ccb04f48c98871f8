"""What captioners have answered, kept beside the dataset while a run goes on: `captions.jsonl`.

A run over half a million pictures takes days, so each batch is appended and flushed to the disk,
and `metadata.jsonl` is replaced once, at the end. Killed at any moment, a run loses the batch it
was in. A line is found again by its key, a hash of all that the answer depends on (picture, model,
prompt, decoding): other settings find nothing, and the old ones find all of theirs.

    >>> with Journal(Path("dataset")) as journal:
    ...     journal.append([Line(key, "images/7.jpg", {"text": "The mole is round."})])
    ...     journal.answer(key)
    {'text': 'The mole is round.'}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dermaflux.errors import DatasetError

NAME: Final = "captions.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One picture's answer, or the reason why there is none; such a picture is asked again."""

    key: str
    file_name: str
    answer: Mapping[str, Any] | None
    error: str = ""

    def to_json(self) -> str:
        """One line of the file, its end included."""
        said = {"error": self.error} if self.answer is None else {"answer": dict(self.answer)}
        content = {"key": self.key, "file_name": self.file_name, **said}
        return json.dumps(content, ensure_ascii=False) + "\n"


def key(*parts: Any) -> str:
    """The hash of JSON values, 32 hex digits: equal for equal values, in whatever order of keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Journal:
    """The answers of all runs on a dataset; one process at a time may append to a file.

    `part` (k, n) has a file of its own, so that n processes can share the work; answers of all
    files are found.

    Raises:
        DatasetError: another process has the file open for appending.
        OSError: the dataset's folder takes no files.
    """

    def __init__(self, folder: Path, part: tuple[int, int] | None = None) -> None:
        name = NAME if part is None else f"captions.{part[0]}-of-{part[1]}.jsonl"
        self.file = folder / name
        self._answers: dict[str, Mapping[str, Any]] = {}
        self._stream = self.file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise DatasetError(
                f"{self.file} is being written by another run; wait for its end, or share the work "
                "with --part 1/2 and --part 2/2"
            ) from error
        self._cut_half_line()
        for file in sorted({self.file, folder / NAME, *folder.glob("captions.*-of-*.jsonl")}):
            if file.is_file():
                self._read(file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def answer(self, key: str) -> Mapping[str, Any] | None:
        """What was answered under this key, or None."""
        return self._answers.get(key)

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines and flush them to the disk.

        Raises:
            OSError: the disk is full; what was written of the batch is taken back.
        """
        whole = self._stream.seek(0, os.SEEK_END)
        try:
            self._stream.write("".join(line.to_json() for line in lines).encode())
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            os.ftruncate(self._stream.fileno(), whole)
            error.filename = str(self.file)
            raise
        self._answers |= {line.key: line.answer for line in lines if line.answer is not None}

    def _cut_half_line(self) -> None:
        """A process that was killed, or a full disk, may have left the last line unfinished."""
        self._stream.seek(0)
        whole = 0
        for line in self._stream:
            if line.endswith(b"\n"):
                whole += len(line)
        self._stream.truncate(whole)

    def _read(self, file: Path) -> None:
        damaged = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    content = json.loads(line)
                    if "answer" in content:
                        self._answers[str(content["key"])] = dict(content["answer"])
                except (ValueError, TypeError, KeyError):
                    damaged += 1
        if damaged:
            log.warning("%s: %d damaged lines are left out and asked again", file, damaged)
