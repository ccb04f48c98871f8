"""All collections that can be imported: the name on the command line, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dermaflux.errors import DatasetError
from training.sources import challenges, measured, others
from training.sources.found import Found


@dataclass(frozen=True)
class Collection:
    """A public collection. `name` is also its section of `labels.toml`."""

    name: str
    read: Callable[[Path], Iterator[Found]]

    @property
    def help(self) -> str:
        return (self.read.__doc__ or "").split("\n")[0]


COLLECTIONS: Final = (
    Collection("mednode", others.mednode),
    Collection("hiba", challenges.hiba),
    Collection("derm12345", others.derm12345),
    Collection("isic2017", challenges.isic2017),
    Collection("isic2019", challenges.isic2019),
    Collection("isic2020", challenges.isic2020),
    Collection("milk10k", challenges.milk10k),
    Collection("pad-ufes-20", others.pad_ufes_20),
    Collection("kaggle1", others.kaggle1),
    Collection("kaggle2", others.kaggle2),
    Collection("ddi", others.ddi),
    Collection("isic2024", challenges.isic2024),
    Collection("ham10000", others.ham10000),
    Collection("measured", measured.folder_of_measures),
)


def named(name: str) -> Collection:
    """The collection of that name.

    Raises:
        DatasetError: there is none.
    """
    for collection in COLLECTIONS:
        if collection.name == name:
            return collection
    known = ", ".join(collection.name for collection in COLLECTIONS)
    raise DatasetError(f"no collection is named {name!r}; use one of {known}")
