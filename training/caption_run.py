"""A captioner over a dataset: batch by batch, resumed where it was stopped, written at the end.

    >>> run(Path("dataset"), VisionCaptioner(Path("dataset"), Asking("FOLDER")))["captioned"]
    6948

Each batch's answers go into the journal (`training.caption_journal`); `metadata.jsonl` is replaced
once, when all pictures have been tried. A picture that cannot be captioned fails no other: it keeps
the text it had, is told of, and is tried again by the next run.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from tqdm import tqdm

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from training.caption_journal import Journal, Line

VERSION: Final = 1
"""Of what `more["caption"]` of a record holds."""
MAX_PIXELS: Final = 200_000_000
"""Of a picture: the largest originals of the collections have 50 million."""
SHOWN: Final = 20
"""Failures that are shown; the journal has all."""
_HOPELESS: Final = 32
"""Pictures that may fail before any succeeds; then it is the model or the folder."""


@dataclass(frozen=True)
class Picture:
    """A record whose picture's bytes have this hash."""

    record: Record
    sha256: str


@dataclass(frozen=True)
class Failed:
    """Why a picture has no caption."""

    reason: str


Answer = Mapping[str, Any] | Failed


class Captioner(Protocol):
    """Pictures in, answers out. Answers are JSON objects that a journal can keep."""

    batch: int

    def key(self, picture: Picture) -> str:
        """A hash of all that the answer depends on."""
        ...

    def answer(self, pictures: Sequence[Picture]) -> list[Answer]:
        """One answer a picture; a picture that cannot be answered fails no other."""
        ...

    def captioned(self, record: Record, answer: Mapping[str, Any]) -> Record:
        """The record with its caption and where that comes from."""
        ...


def run(folder: Path, asked: Captioner, part: tuple[int, int] | None = None) -> dict[str, Any]:
    """Caption a dataset; what the command prints.

    Raises:
        DatasetError: what `dermaflux.dataset.read` and `Journal` refuse, or no picture succeeded.
        EngineError: the model cannot be opened.
        OSError: the folder cannot be written; answers up to the last batch are kept.
    """
    started = time.monotonic()
    records = dataset.read(folder)
    if part is not None:
        records = records[part[0] - 1 :: part[1]]
    with Journal(folder, part) as journal:
        answers, failures, new = _answered(folder, records, asked, journal)
    if failures and not answers:
        raise DatasetError(
            f"none of {len(failures)} pictures could be captioned; {_first(failures)}"
        )
    if part is None:
        _write(folder, records, asked, answers)
    for name, reason in list(failures.items())[:SHOWN]:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more", file=sys.stderr)
    return {
        "dataset": str(folder),
        "pictures": len(answers) + len(failures),
        "captioned": len(answers),
        "new": new,
        "failed": len(failures),
        "failures": dict(list(failures.items())[:SHOWN]),
        "written": part is None,
        "seconds": round(time.monotonic() - started, 1),
    }


def _write(
    folder: Path, records: Sequence[Record], asked: Captioner, answers: Mapping[str, Any]
) -> None:
    """All captions into `metadata.jsonl`, which is read again: whoever changed it during the days
    of a run keeps the change, and a record that says another thing now is asked by the next run."""
    then = {record.file_name: record for record in records}
    written = []
    for record in dataset.read(folder):
        before, answer = then.get(record.file_name), answers.get(record.file_name)
        if before is not None and answer is not None:
            same = replace(before, text=record.text, more=record.more) == record
            record = asked.captioned(record, answer) if same else record
        written.append(record)
    try:
        dataset.write(folder, written)
    except OSError as error:
        error.filename = error.filename or str(folder / dataset.METADATA)
        raise


def _answered(
    folder: Path, records: Sequence[Record], asked: Captioner, journal: Journal
) -> tuple[dict[str, Any], dict[str, str], int]:
    """File name -> answer, file name -> reason, and how many answers are new."""
    answers: dict[str, Any] = {}
    failures: dict[str, str] = {}
    waiting: list[tuple[str, Picture]] = []
    new = 0
    bar = tqdm(total=len(records), unit="picture")

    def ask() -> None:
        nonlocal new
        said = asked.answer([picture for _, picture in waiting])
        lines = []
        for (key, picture), one in zip(waiting, said, strict=True):
            name = picture.record.file_name
            if isinstance(one, Failed):
                failures[name] = one.reason
                lines.append(Line(key, name, None, one.reason))
            else:
                answers[name] = one
                lines.append(Line(key, name, one))
                new += 1
        journal.append(lines)
        bar.update(len(waiting))
        waiting.clear()
        if len(failures) >= _HOPELESS and not answers:
            raise DatasetError(f"the first {len(failures)} pictures all failed; {_first(failures)}")

    with bar:
        for record in records:
            try:
                sha256 = record.sha256 or _sha256(folder / record.file_name)
            except OSError as error:
                failures[record.file_name] = f"cannot be read: {error.strerror or error}"
                bar.update()
                continue
            picture = Picture(record, sha256)
            key = asked.key(picture)
            known = journal.answer(key)
            if known is not None:
                answers[record.file_name] = known
                bar.update()
                continue
            waiting.append((key, picture))
            if len(waiting) == asked.batch:
                ask()
        if waiting:
            ask()
    return answers, failures, new


def _first(failures: dict[str, str]) -> str:
    name, reason = next(iter(failures.items()))
    return f"the first: {name}: {reason}"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
