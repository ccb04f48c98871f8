"""A file of JSON objects, one a line, read as a stream: every line is right or wrong by itself.

>>> for number, text in lines(Path("requests.jsonl")):
...     row = parsed(text)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from dermaflux.errors import DatasetError
from serving.batch.documents import written

MAX_LINE: Final = 2**16
"""Bytes. The longest prompt that a request may have, every character escaped, takes 24,000."""
MAX_REASON: Final = 300
"""Characters of a reason: a line may hold much more than anybody reads."""


def lines(file: Path) -> Iterator[tuple[int, str | None]]:
    """Numbers from 1 and texts of the lines that are not blank; None where one is too long.

    A byte order mark at the beginning is left out. Lines end at line feeds alone.

    Raises:
        DatasetError: the file is missing, cannot be read, or is not UTF-8; with line and byte.
    """
    if str(file) == "-":
        raise DatasetError("- is no file: a job reads its lines again when it goes on; name a file")
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_LINE)
                    yield number, None
                    continue
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, _decoded(file, number, line)
    except FileNotFoundError:
        raise DatasetError(f"there is no file {file}; write one, a JSON object a line") from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error


def parsed(text: str | None) -> dict[str, Any]:
    """The object of a line, more strictly than Python: no NaN, and no key twice.

    Raises:
        ValueError: it is too long, no JSON, or no object.
        RecursionError: lists and objects lie in each other too deeply.
    """
    if text is None:
        raise ValueError(f"has more than {MAX_LINE} bytes")
    try:
        # A line's end is no place in it, of which to complain.
        row = json.loads(
            text.rstrip(" \t\r\n"),
            object_pairs_hook=_once, parse_constant=_refused, parse_int=_whole,
        )  # fmt: skip
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"needs a JSON object, not {written(row)}")
    return row


def plain(reason: str) -> str:
    """A reason on one line, of characters that every file holds, no longer than is read."""
    start = reason[: MAX_REASON + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


def _decoded(file: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file}, line {number}, byte {error.start + 1} is not UTF-8 ({error.reason}); save "
            "the file as UTF-8"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"names {key!r} twice; keep one")
        row[key] = value
    return row


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python's own words are advice to programmers
        raise ValueError(
            f"has a number of {len(digits.lstrip('-'))} digits, which no key takes"
        ) from None


def _refused(word: str) -> NoReturn:
    raise ValueError(f"is not JSON ({word} is no number there)")
