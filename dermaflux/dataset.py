"""The dataset/ contract: pictures in a folder and `metadata.jsonl`, a line a picture.

The convention is Hugging Face's `imagefolder`, so other tools open it too. Training reads it, the
batch generator writes it, and so does whoever imports a public collection. `metadata.jsonl` is
written last, whole or not at all: where it is, the pictures that it names are.

    >>> records = read(Path("dataset"))
    >>> records[0].lesion.diagnosis
    'nevus'
    >>> write(Path("dataset"), [replace(record, text=caption(record.lesion)) for record in records])
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final

from dermaflux import files
from dermaflux.errors import DatasetError
from dermaflux.prompt import VOCABULARY, Lesion

METADATA: Final = "metadata.jsonl"
SPLITS: Final = ("train", "val", "test")
SEXES: Final = ("female", "male")
_TEXTS: Final = (
    "file_name", "mask", "text", "group", "source", "licence", "attribution", "confirmed",
    "sha256", "site", "skin_type",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One picture. Attributes are the words of `dermaflux.prompt.VOCABULARY`.

    `file_name` and `mask` are relative to the dataset's folder, with forward slashes. `text` is the
    caption. `group` is the patient or the lesion, which a split never divides: the file's name
    where nobody knows. `age` is in years; `skin_type` a Fitzpatrick type or group as its source
    says it (`III`, `V-VI`). `confirmed` tells how the label is known (`histo`, `follow_up`, ...),
    `attribution` whom the licence asks to name. `sha256` is that of the picture's file. `more` has
    all other keys of the line as they were.

    Raises:
        DatasetError: a value is of another type or out of range, a text is none that UTF-8 can
            hold, or a path leaves the folder.
    """

    file_name: str
    label: str
    text: str = ""
    diagnosis: str | None = None
    asymmetry: str | None = None
    border: str | None = None
    colors: tuple[str, ...] = ()
    size: str | None = None
    structures: tuple[str, ...] = ()
    split: str = "train"
    group: str = ""
    source: str = ""
    licence: str = ""
    attribution: str = ""
    confirmed: str = ""
    age: float | None = None
    sex: str | None = None
    site: str | None = None
    skin_type: str | None = None
    mask: str | None = None
    sha256: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("file_name", "mask"):
            path = getattr(self, name)
            if path is None and name == "mask":
                continue
            if not isinstance(path, str) or not _inside(path):
                raise DatasetError(f"{name} {path!r} is no path inside the dataset's folder")
        for name in ("text", "group", "source", "licence", "attribution", "confirmed", "sha256"):
            if not isinstance(getattr(self, name), str):
                raise DatasetError(f"{name} needs a text, not {getattr(self, name)!r}")
        for name in ("site", "skin_type"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise DatasetError(f"{name} needs a text, not {getattr(self, name)!r}")
        for name in _TEXTS:
            _written(name, getattr(self, name) or "")
        if self.more:
            try:
                text = json.dumps(dict(self.more), ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise DatasetError(f"more holds what JSON cannot hold: {error}") from error
            _written("a key that is not ours", text)
        if self.split not in SPLITS:
            raise DatasetError(f"split {self.split!r} is not known; use {', '.join(SPLITS)}")
        if self.sex is not None and self.sex not in SEXES:
            raise DatasetError(f"sex {self.sex!r} is not known; use {', '.join(SEXES)}, or none")
        if self.age is not None:
            number = isinstance(self.age, int | float) and not isinstance(self.age, bool)
            if not number or not 0 <= self.age <= 130:
                raise DatasetError(
                    f"age {reprlib.repr(self.age)} is no number of years; use 0 to 130"
                )
        if not self.group:
            object.__setattr__(self, "group", self.file_name)
        # Refuses words that nobody knows, and labels that their diagnosis contradicts.
        self.lesion  # noqa: B018

    @property
    def lesion(self) -> Lesion:
        """The attributes, as captions and requests have them."""
        return Lesion.from_mapping({name: getattr(self, name) for name in VOCABULARY})

    @classmethod
    def from_mapping(cls, row: Mapping[str, Any]) -> Record:
        """A record of a line's JSON object.

        Raises:
            DatasetError: a key is missing, or a value is none that a record may have.
        """
        known = {one.name for one in fields(cls)} - {"more"}
        given = {name: value for name, value in row.items() if name in known and value is not None}
        for name in ("colors", "structures"):
            words = given.get(name, ())
            if isinstance(words, str) or not isinstance(words, list | tuple):
                raise DatasetError(f"{name} needs a list of words, not {words!r}")
            given[name] = tuple(words)
        missing = [name for name in ("file_name", "label") if name not in given]
        if missing:
            raise DatasetError(f"there is no {missing[0]}")
        more = {name: value for name, value in row.items() if name not in known}
        try:
            return cls(**given, more=more)
        except ValueError as error:
            raise DatasetError(str(error)) from error

    def to_mapping(self) -> dict[str, Any]:
        """The line's JSON object: what is unknown is left out."""
        # Not `asdict`, whose deep copies take most of a large dataset's writing.
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del content["more"]
        return {k: v for k, v in content.items() if v not in (None, "", ())} | dict(self.more)


def read(folder: Path) -> list[Record]:
    """The records of a dataset, in the order of its lines. Pictures are not opened.

    Raises:
        DatasetError: there is no `metadata.jsonl`, or it has a line that is no record, named twice
            or none at all; the message names the line.
    """
    file = folder / METADATA
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DatasetError(
            f"{folder} is no dataset: it has no {METADATA}; make one with python -m training.data "
            "import"
        ) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 ({error}); save it so") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error
    records: list[Record] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"needs an object, not {line.strip()[:40]}")
            record = Record.from_mapping(row)
            if record.file_name in first:
                raise ValueError(f"{record.file_name} was named by line {first[record.file_name]}")
        except (ValueError, DatasetError) as error:
            raise DatasetError(f"{file}, line {number}: {error}") from error
        except RecursionError:
            raise DatasetError(
                f"{file}, line {number}: lists and objects lie in each other too deeply"
            ) from None
        first[record.file_name] = number
        records.append(record)
    if not records:
        raise DatasetError(f"{file} is empty")
    return records


def write(folder: Path, records: Iterable[Record], within: Path | None = None) -> None:
    """Write `metadata.jsonl`, whole or not at all; equal records make equal files.

    `within` is where it lies until it is whole; see `files.replacing`.

    Raises:
        DatasetError: the folder is not there or takes no files, or the disk is full.
    """
    file = folder / METADATA
    with writing(file), files.replacing(file, within) as stream:
        for record in records:
            line = json.dumps(record.to_mapping(), ensure_ascii=False) + "\n"
            stream.write(line.encode())


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What the system says while `file` is written (a full disk: without its name) names it.

    Raises:
        DatasetError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"{file} cannot be written: {error.strerror or error}; mend that and start again"
        ) from error


def _written(name: str, text: str) -> None:
    """Refuse halves of surrogate pairs, which JSON may spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{name} holds {text[error.start]!r}, half of a character; write the text in UTF-8"
        ) from error


def _inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return bool(path) and "\\" not in path and not parts.is_absolute() and ".." not in parts.parts
