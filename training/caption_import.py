"""Captions that were made elsewhere: a JSON file of names and texts, into a dataset's records.

The paper's own caption files have no published schema, so two plain forms are taken: an object
`{"ISIC_0073753.jpg": "This photo ..."}`, or a list of objects with a name (`file_name` or `image`)
and a text (`text` or `caption`). Names match a record's `file_name`, or its last part with or
without ending where only one record has it. Texts stay as they are.

    >>> texts, sha256 = read(Path("isic2020.json"))
    >>> matches(records, texts).found["images/ISIC_0073753.jpg"]
    'This photo depicts a benign lesion. ...'
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from training.caption_run import VERSION

NAMES: Final = ("file_name", "image")
TEXTS: Final = ("text", "caption")
_FORMS: Final = (
    "give an object of name and text, or a list of objects with "
    f"{' or '.join(NAMES)}, and {' or '.join(TEXTS)}"
)


@dataclass(frozen=True)
class Matches:
    """`found`: file name -> text. `unknown` names no record, `ambiguous` more than one."""

    found: Mapping[str, str]
    unknown: tuple[str, ...]
    ambiguous: tuple[str, ...]


def read(file: Path) -> tuple[dict[str, str], str]:
    """Name -> text, and the file's SHA-256.

    Raises:
        DatasetError: it is no JSON of one of the two forms, or names a picture twice with
            different texts; the message says what was found.
    """
    try:
        data = file.read_bytes()
        content = json.loads(data)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read as JSON: {error}") from error
    texts: dict[str, str] = {}
    for place, (name, text) in enumerate(_pairs(file, content), 1):
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise DatasetError(
                f"{file}, caption {place}: {_kind(name)} stands for {_kind(text)}; {_FORMS}"
            )
        if texts.setdefault(name, text) != text:
            raise DatasetError(f"{file}, caption {place}: {name} has another text before it")
    if not texts:
        raise DatasetError(f"{file} holds no caption; {_FORMS}")
    return texts, hashlib.sha256(data).hexdigest()


def matches(records: Sequence[Record], texts: Mapping[str, str]) -> Matches:
    """Which text belongs to which record. A full file name goes before its last part, that before
    the part without ending.

    Raises:
        DatasetError: none of the names is a record's.
    """
    places: dict[str, set[str]] = {}
    for record in records:
        path = PurePosixPath(record.file_name)
        for name in {path.name, path.stem}:
            places.setdefault(name, set()).add(record.file_name)
    full = {record.file_name for record in records}
    found: dict[str, str] = {}
    unknown: list[str] = []
    ambiguous: list[str] = []
    # Exact names first: a last part never takes the place of one.
    for name in sorted(texts, key=lambda one: one not in full):
        path = PurePosixPath(name)
        owners = {name} if name in full else places.get(path.name) or places.get(path.stem) or set()
        if len(owners) == 1:
            found.setdefault(next(iter(owners)), texts[name])
        else:
            (ambiguous if owners else unknown).append(name)
    if not found:
        raise DatasetError(
            f"none of the {len(texts)} names is a picture of the dataset: {sorted(texts)[0]!r} and "
            f"so on there, {records[0].file_name!r} and so on here"
        )
    return Matches(found, tuple(unknown), tuple(ambiguous))


def imported(record: Record, text: str, file: str, sha256: str) -> Record:
    """The record with its text and where that comes from; `file` is a name, not a path."""
    told = {"version": VERSION, "captioner": "import", "file": file, "sha256": sha256}
    return replace(record, text=text.strip(), more={**record.more, "caption": told})


def _pairs(file: Path, content: Any) -> list[tuple[Any, Any]]:
    if isinstance(content, dict):
        return list(content.items())
    if not isinstance(content, list):
        raise DatasetError(f"{file} holds {_kind(content)}; {_FORMS}")
    pairs = []
    for place, one in enumerate(content, 1):
        keys = one.keys() if isinstance(one, dict) else ()
        name = next((key for key in NAMES if key in keys), None)
        text = next((key for key in TEXTS if key in keys), None)
        if name is None or text is None:
            raise DatasetError(f"{file}, item {place} of its list is {_kind(one)}; {_FORMS}")
        pairs.append((one[name], one[text]))
    return pairs


def _kind(value: Any) -> str:
    """A JSON value in few words."""
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(repr, list(value)[:8]))}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
