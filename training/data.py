"""A dataset folder -> samples: what each picture shows, where it comes from, which split it is in.

Two layouts are read: the project's own `dataset/` (imagefolder with `metadata.jsonl`) and a folder
with `metadata.csv` whose columns name the measured attributes (`image, label, diagnosis, split,
group, asymmetry_word, ...`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.errors import DatasetError
from dermaflux.prompt import DIAGNOSES, Lesion

__all__ = [
    "DatasetError",
    "Sample",
    "count",
    "licences",
    "load_images",
    "load_mask",
    "positive",
    "read",
]


@dataclass(frozen=True)
class Sample:
    """One picture of a dataset.

    `group` is the patient or lesion: a split never divides it. `confirmed` tells how the label is
    known (`histo`, `follow_up`, ...; empty where the source does not say).
    """

    file: Path
    lesion: Lesion
    split: str
    group: str
    source: str
    licence: str
    confirmed: str = ""
    mask: Path | None = None


_SIZES = {
    "small in the field": "small",
    "medium in the field": "medium",
    "large in the field": "large",
    "reaches the image edge": "edge",
}
_STRUCTURES = {
    "t2_pigment_network": "pigment network",
    "t2_negative_network": "negative network",
    "t2_streaks": "streaks",
    "t2_milia_like_cyst": "milia-like cysts",
    "t2_globules": "globules",
}
_DIAGNOSES = {
    "melanocytic nevus": "nevus",
    "actinic keratosis / Bowen's disease": "actinic keratosis",
}


def read(folder: Path, split: str | None = None) -> list[Sample]:
    """All samples of a dataset folder, or those of one split.

    Raises:
        DatasetError: no metadata file, a missing column, an unknown word, or no sample left.
    """
    try:
        samples = _rows(folder)
    except UnicodeDecodeError as error:
        raise DatasetError(f"{folder}: its metadata is not UTF-8 ({error}); save it so") from error
    except csv.Error as error:
        raise DatasetError(f"{folder}/metadata.csv is no CSV: {error}") from error
    samples = [sample for sample in samples if split is None or sample.split == split]
    if not samples:
        raise DatasetError(f"{folder} has no sample in split {split!r}")
    return samples


def _rows(folder: Path) -> list[Sample]:
    if (folder / "metadata.jsonl").is_file():
        with (folder / "metadata.jsonl").open(encoding="utf-8") as lines:
            return [
                _from_json(folder, line, number)
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    if (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as lines:
            return [
                _from_csv(folder, row, number)
                for number, row in enumerate(csv.DictReader(lines), 2)
            ]
    raise DatasetError(
        f"{folder} is no dataset: it has neither metadata.jsonl nor metadata.csv; "
        "give the folder that holds one of them"
    )


def _from_json(folder: Path, line: str, number: int) -> Sample:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"needs an object, not {line.strip()[:40]}")
        lesion = Lesion.from_mapping(
            {name: row.get(name) for name in Lesion.__dataclass_fields__ if row.get(name)}
        )
        return Sample(
            file=folder / str(row["file_name"]),
            lesion=lesion,
            split=str(row.get("split", "train")),
            group=str(row.get("group", row["file_name"])),
            source=str(row.get("source", "")),
            licence=str(row.get("licence", "")),
        )
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{folder}/metadata.jsonl, line {number}: {error}") from error


def _from_csv(folder: Path, row: dict[str, str], number: int) -> Sample:
    try:
        if None in row.values():
            raise ValueError(f"ends after {sum(v is not None for v in row.values())} fields; "
                             f"the header has {len(row)}")  # fmt: skip
        diagnosis = _DIAGNOSES.get(row["diagnosis"], row["diagnosis"])
        lesion = Lesion(
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
        )
        return Sample(
            file=folder / row["image"],
            lesion=lesion,
            split=row["split"],
            group=row["group"],
            source=row["source"],
            licence=row["license"],
            confirmed=row.get("dx_type", ""),
            mask=folder / row["mask"] if row.get("mask") else None,
        )
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{folder}/metadata.csv, line {number}: {error}") from error


def load_images(samples: Sequence[Sample], size: int, threads: int = 2) -> NDArray[np.uint8]:
    """The pictures of `samples`, shrunk to `size` x `size` (Lanczos): [N, size, size, 3].

    Raises:
        DatasetError: a file is missing or no picture; the message names it.
    """

    def load(sample: Sample) -> NDArray[np.uint8]:
        try:
            with Image.open(sample.file) as image:
                square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        except OSError as error:
            raise DatasetError(f"{sample.file} cannot be read as a picture: {error}") from error
        return np.asarray(square, dtype=np.uint8)

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(load, samples)))


def load_mask(sample: Sample, size: int) -> NDArray[np.bool_] | None:
    """The lesion's mask, [size, size], or None where the sample has none.

    Raises:
        DatasetError: the file is missing or no picture.
    """
    if sample.mask is None:
        return None
    try:
        with Image.open(sample.mask) as image:
            square = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
    except OSError as error:
        raise DatasetError(f"{sample.mask} cannot be read as a mask: {error}") from error
    return np.asarray(square) > 127


def licences(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """The distinct (source, licence) pairs of samples, sorted."""
    return sorted({(sample.source, sample.licence) for sample in samples})


def positive(text: str) -> float:
    """A finite number above 0, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is another text.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def count(text: str) -> int:
    """A whole number above 0, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is another text.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
