"""A dataset folder -> samples: what each picture shows, where it comes from, which split it is in.

Two layouts are read: the project's own `dataset/` (imagefolder with `metadata.jsonl`) and a folder
with `metadata.csv` whose columns name the measured attributes (`image, label, diagnosis, split,
group, asymmetry_word, ...`).

    >>> samples = read(Path("datasets/ham10000"), "train")
    >>> load_images(samples, 224).shape
    (5553, 224, 224, 3)

As a command it makes datasets and looks after them (`training.curate`):

    python -m training.data import ham10000 HAM10000 --out datasets/ham10000
    python -m training.data check datasets/ham10000
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.prompt import Lesion
from dermaflux.thumbnails import UNREADABLE, why
from training import measured

__all__ = [
    "DatasetError",
    "Sample",
    "count",
    "licences",
    "load_images",
    "load_mask",
    "positive",
    "read",
    "records",
]


@dataclass(frozen=True)
class Sample:
    """One picture of a dataset.

    `group` is the patient or lesion: a split never divides it. `confirmed` tells how the label is
    known (`histo`, `follow_up`, ...; empty where the source does not say). `name` is the file as
    its dataset names it; age (in years), sex, site and skin type are as in `dermaflux.dataset`,
    None where nobody says.
    """

    file: Path
    lesion: Lesion
    split: str
    group: str
    source: str
    licence: str
    confirmed: str = ""
    mask: Path | None = None
    attribution: str = ""
    name: str = ""
    age: float | None = None
    sex: str | None = None
    site: str | None = None
    skin_type: str | None = None


def read(folder: Path, split: str | None = None) -> list[Sample]:
    """All samples of a dataset folder, or those of one split.

    Raises:
        DatasetError: no metadata file, a missing column, an unknown word, or no sample left.
    """
    samples = [
        _sample(folder, record)
        for record in records(folder)
        if split is None or record.split == split
    ]
    if not samples:
        raise DatasetError(f"{folder} has no sample in split {split!r}")
    return samples


def records(folder: Path) -> list[Record]:
    """The records of a folder in either layout.

    Raises:
        DatasetError: it has neither, or a line that is no record.
    """
    if (folder / dataset.METADATA).is_file():
        return dataset.read(folder)
    if (folder / measured.METADATA).is_file():
        return measured.read(folder)
    raise DatasetError(
        f"{folder} is no dataset: it has neither {dataset.METADATA} nor {measured.METADATA}; "
        "give the folder that holds one of them, or make one with python -m training.data import"
    )


def _sample(folder: Path, record: Record) -> Sample:
    return Sample(
        file=folder / record.file_name,
        lesion=record.lesion,
        split=record.split,
        group=record.group,
        source=record.source,
        licence=record.licence,
        confirmed=record.confirmed,
        mask=folder / record.mask if record.mask else None,
        attribution=record.attribution,
        name=record.file_name,
        age=record.age,
        sex=record.sex,
        site=record.site,
        skin_type=record.skin_type,
    )


def load_images(samples: Sequence[Sample], size: int, threads: int = 2) -> NDArray[np.uint8]:
    """The pictures of `samples`, shrunk to `size` x `size` (Lanczos): [N, size, size, 3].

    Raises:
        DatasetError: a file is missing or no picture; the message names it.
    """

    def load(sample: Sample) -> NDArray[np.uint8]:
        try:
            with Image.open(sample.file) as image:
                square = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        except UNREADABLE as error:
            raise DatasetError(
                f"{sample.file} cannot be read as a picture: {why(error)}"
            ) from error
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
    except UNREADABLE as error:
        raise DatasetError(f"{sample.mask} cannot be read as a mask: {why(error)}") from error
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


if __name__ == "__main__":
    from training.curate import main

    sys.exit(main())
