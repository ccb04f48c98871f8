"""Folders with a `metadata.csv` of attributes measured from masks -> records of a dataset.

Columns: `image, label, diagnosis, split, group, asymmetry_word, border_word, color_words,
size_word, source, license`, and where they are `mask, dx_type, age, sex, site, caption, t2_*`.

    >>> records = read(Path("isic2017"))
    >>> records[0].colors
    ('light brown', 'dark brown', 'black')
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.prompt import DIAGNOSES

METADATA: Final = "metadata.csv"
_SIZES: Final = {
    "small in the field": "small",
    "medium in the field": "medium",
    "large in the field": "large",
    "reaches the image edge": "edge",
}
_STRUCTURES: Final = {
    "t2_pigment_network": "pigment network",
    "t2_negative_network": "negative network",
    "t2_streaks": "streaks",
    "t2_milia_like_cyst": "milia-like cysts",
    "t2_globules": "globules",
}
_DIAGNOSES: Final = {
    "melanocytic nevus": "nevus",
    "actinic keratosis / Bowen's disease": "actinic keratosis",
}


def read(folder: Path) -> list[Record]:
    """All rows of the folder's `metadata.csv`. Pictures are not opened.

    Raises:
        DatasetError: it is no such table, or a row has an unknown word; the message names the line.
    """
    file = folder / METADATA
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            return [_record(file, row, n) for n, row in enumerate(csv.DictReader(lines), 2)]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 ({error}); save it so") from error
    except csv.Error as error:
        raise DatasetError(f"{file} is no CSV: {error}") from error


def _record(file: Path, row: Mapping[str, str], number: int) -> Record:
    try:
        if None in row.values():
            given = sum(value is not None for value in row.values())
            raise ValueError(f"ends after {given} fields; the header has {len(row)}")
        diagnosis = _DIAGNOSES.get(row["diagnosis"], row["diagnosis"])
        known = {word: row.get(word) or "" for word in ("age", "sex", "site")}
        return Record(
            file_name=row["image"],
            label=row["label"],
            diagnosis=diagnosis if diagnosis in DIAGNOSES else None,
            asymmetry=row["asymmetry_word"] or None,
            border=row["border_word"].removesuffix(" border") or None,
            colors=tuple(word for word in row["color_words"].split(", ") if word),
            size=_SIZES[row["size_word"]] if row["size_word"] else None,
            structures=tuple(
                word
                for column, word in _STRUCTURES.items()
                if row.get(column) not in (None, "", "0", "0.0")
            ),
            split=row["split"],
            group=row["group"],
            source=row["source"],
            licence=row["license"],
            confirmed=row.get("dx_type") or "",
            age=float(known["age"]) if known["age"] else None,
            sex=known["sex"] if known["sex"] in ("female", "male") else None,
            site=known["site"] if known["site"] not in ("", "unknown") else None,
            mask=row.get("mask") or None,
        )
    except (KeyError, ValueError, DatasetError) as error:
        raise DatasetError(f"{file}, line {number}: {error}") from error
