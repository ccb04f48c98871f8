"""What an adapter finds in a publisher's folder, and the tables and files it is found in.

An adapter reads metadata as published and says what each picture is in the publisher's own words;
`training.labels` says what these words mean here, `training.importing` copies the pictures.

    >>> pictures = Pictures.under(folder)
    >>> for row in table(folder, "metadata.csv", ("img_id", "diagnostic")):
    ...     yield Found(pictures[row["img_id"]], row["img_id"], row["diagnostic"])
"""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dermaflux.errors import DatasetError

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_NOTHING: Final = frozenset({"", "nan", "na", "n/a", "none", "null", "unknown", "unk"})
_SKIN: Final = ("I", "II", "III", "IV", "V", "VI")
_LICENCES: Final = {
    # The ISIC Archive's words; it means version 4.0 (api.isic-archive.com shows the links).
    "CC-0": "CC0-1.0",
    "CC-BY": "CC-BY-4.0",
    "CC-BY-NC": "CC-BY-NC-4.0",
}
_CONFIRMED: Final = {
    "histopathology": "histo",
    "single image expert consensus": "consensus",
    "serial imaging showing no change": "follow_up",
    "confocal microscopy with consensus dermoscopy": "confocal",
}


@dataclass(frozen=True)
class Found:
    """One picture as its publisher has it.

    `file` is None where the metadata names a picture that the folder lacks. `name` is unique in
    the collection and becomes the file's name. `kind` is the publisher's class, a key of
    `labels.toml`; `term` its diagnosis in words, where that is another column; `said` the benign or
    malignant of a further column, which has to agree. `group` is the patient or lesion. Empty
    licence and attribution mean those of the collection. `words` are attributes in the vocabulary
    of `dermaflux.prompt`, `more` what a record keeps besides.
    """

    file: Path | None
    name: str
    kind: str
    term: str = ""
    said: str = ""
    group: str = ""
    split: str = "train"
    confirmed: str = ""
    age: float | None = None
    sex: str | None = None
    site: str | None = None
    skin_type: str | None = None
    mask: Path | None = None
    modality: str = ""
    source: str = ""
    licence: str = ""
    attribution: str = ""
    words: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


class Pictures:
    """The pictures below a folder by the stem of their names."""

    def __init__(self, files: Mapping[str, Path], everything: Sequence[Path]) -> None:
        self._files = files
        self._everything = everything

    @classmethod
    def under(cls, folder: Path) -> Pictures:
        """All pictures below `folder`; where two have one stem, the first path counts.

        Raises:
            DatasetError: it is no folder, or has no pictures.
        """
        if not folder.is_dir():
            raise DatasetError(f"{folder} is no folder; give the one that the collection lies in")
        files: dict[str, Path] = {}
        everything: list[Path] = []
        packed: list[str] = []
        for place, names in _walked(folder):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and not name.startswith("."):
                    files.setdefault(stem, place / name)
                    everything.append(place / name)
                elif suffix.lower() in (".zip", ".hdf5", ".gz", ".7z"):
                    packed.append(name)
        if not files:
            hint = f"; unpack {packed[0]} first" if packed else ""
            raise DatasetError(f"{folder} has no pictures ({', '.join(SUFFIXES)}){hint}")
        return cls(files, everything)

    def get(self, name: str) -> Path | None:
        """The picture of that name, with or without its suffix, or None."""
        stem, suffix = os.path.splitext(name)
        return self._files.get(stem if suffix.lower() in SUFFIXES else name)

    def all(self) -> Sequence[Path]:
        """Every picture, those that share a stem included."""
        return self._everything


def locate(folder: Path, *names: str) -> Path | None:
    """The file of one of these names, in `folder` or the nearest folder below, or None."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found: dict[str, list[Path]] = {name: [] for name in names}
    for place, inside in _walked(folder):
        for name in found.keys() & set(inside):
            if (place / name).is_file():
                found[name].append(place / name)
    for name in names:
        if found[name]:
            return min(found[name], key=lambda path: (len(path.parts), path))
    return None


def _walked(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below and its files, sorted; those that links lead to come last, and once.

    Large collections often lie on another disk. Links back up, which would go round for ever, are
    not followed.
    """
    seen: set[str] = set()
    root = os.path.join(os.path.realpath(folder), "")
    waiting = deque([os.fspath(folder)])
    while waiting:
        for place, folders, names in os.walk(waiting.popleft()):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for path in (os.path.join(place, name) for name in folders):
                above = os.path.join(os.path.realpath(path), "")
                back = root.startswith(above) or os.path.join(real, "").startswith(above)
                if os.path.islink(path) and not back:
                    waiting.append(path)
            yield Path(place), sorted(names)


def table(folder: Path, name: str | Sequence[str], columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a publisher's table, values stripped; tab-separated where its suffix is `.tab`.

    `name` may be several names, of which one has to be there.

    Raises:
        DatasetError: it is not there, is no table, or lacks one of `columns`.
    """
    names = (name,) if isinstance(name, str) else tuple(name)
    file = locate(folder, *names)
    if file is None:
        raise DatasetError(
            f"{folder} has no {' or '.join(names)}; give the folder as its publisher packs it"
        )
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            tab = file.suffix == ".tab" or "\t" in stream.readline()
            stream.seek(0)
            rows = csv.DictReader(stream, delimiter="\t" if tab else ",", strict=True)
            titles = [title.strip() for title in rows.fieldnames or ()]
            if missing := [column for column in columns if column not in titles]:
                raise DatasetError(
                    f"{file} has no column {missing[0]!r}; it has {', '.join(titles) or 'none'}"
                )
            rows.fieldnames = titles
            return [
                {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
                for row in rows
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} is no table of UTF-8 text: {error}") from error


def by(rows: Sequence[Mapping[str, str]], column: str) -> dict[str, Mapping[str, str]]:
    """Rows by the value of a column."""
    return {row[column]: row for row in rows}


def chosen(row: Mapping[str, str], columns: Sequence[str], file: str) -> str:
    """The one column of a one-hot row that is 1, in lower case; empty where all are 0.

    Columns that the table does not have are left out.

    Raises:
        DatasetError: several are 1, or a cell is neither 0 nor 1, as where the row is cut.
    """
    name = next(iter(row.values())) or "a row without a name"
    for column in columns:
        if column in row and number(row[column]) not in (0, 1):
            raise DatasetError(
                f"{file}, row {name}: {column} is {row[column]!r}; 0 or 1 is needed. Get the "
                "table again, or mend the row"
            )
    hot = [column for column in columns if number(row.get(column, "")) == 1]
    if len(hot) > 1:
        raise DatasetError(f"{file}, row {name}: it is {' and '.join(hot)}; one is needed")
    return hot[0].lower() if hot else ""


def number(text: str) -> float | None:
    """The number that a cell holds, or None where it holds none."""
    try:
        return float(text)
    except ValueError:
        return None


def given(text: str | None) -> str:
    """A cell's text, or nothing where it says that nothing is known."""
    text = (text or "").strip()
    return "" if text.lower() in _NOTHING else text


def age(text: str | None) -> float | None:
    """Years of a cell such as `45.0` or `85+`, or None."""
    years = number((text or "").strip().removesuffix("+"))
    return years if years is not None and 0 <= years <= 130 else None


def sex(text: str | None) -> str | None:
    """`female` or `male` of `F`, `MALE` and so on, or None."""
    return {"f": "female", "female": "female", "m": "male", "male": "male"}.get(
        (text or "").strip().lower()
    )


def site(text: str | None) -> str | None:
    """The place on the body in lower case, or None."""
    return given(text).lower() or None


def skin(text: str | None) -> str | None:
    """The Fitzpatrick type, `I` to `VI`, of `3`, `3.0` or `III`, or None."""
    text = given(text).upper()
    if text in _SKIN:
        return text
    value = number(text)
    return _SKIN[int(value) - 1] if value in (1, 2, 3, 4, 5, 6) else None


def licence(text: str | None) -> str:
    """The licence of one picture in the ISIC Archive, as SPDX names it."""
    text = given(text)
    return _LICENCES.get(text.upper(), text)


def confirmed(text: str | None) -> str:
    """How a diagnosis is known, in HAM10000's words where they fit."""
    text = given(text).lower()
    return _CONFIRMED.get(text, text)
