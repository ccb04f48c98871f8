"""Captions from attributes: a record's own words, the rest measured in its picture.

What is measured is measured with the record's mask where it has one, else with the lesion that
`dermaflux.attributes.segment` finds; the record says which (`more["measured"]`), and never that it
is clinical. The words go into the record and, in `dermaflux.prompt`'s wording, into its caption.
Border words are left out unless asked for: on the masks of ISIC 2017 they do not agree with
people's (rank correlation -0.09); "reddish" is the least certain of the colours.

    >>> captioner = AttributeCaptioner(Path("dataset"))
    >>> (answer,) = captioner.answer([picture])
    >>> captioner.captioned(picture.record, answer).text
    'dermoscopic image of a benign lesion, nevus, symmetric, light brown, medium in the field'
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from dermaflux.dataset import Record
from dermaflux.errors import ImageError
from dermaflux.images import decode_upload
from dermaflux.prompt import WORDING, caption
from training import caption_journal
from training.caption_run import MAX_PIXELS, VERSION, Answer, Failed, Picture

WORDS: Final = ("asymmetry", "border", "colors", "size")
"""What can be measured, by the names of a record."""
BY_MASK: Final = "mask"
BY_SEGMENTATION: Final = "segmentation"
_ASPECT: Final = 0.02
"""Share by which sides of mask and picture may differ in proportion, for masks of other size."""


class AttributeCaptioner:
    """Measures in `jobs` processes; with 1, in this one."""

    def __init__(self, folder: Path, border: bool = False, jobs: int = 1) -> None:
        self.folder = folder
        self.words = tuple(word for word in WORDS if border or word != "border")
        self.jobs = jobs
        # Half a second to a few seconds of work for each process: what a kill can lose.
        self.batch = 32 * jobs

    def key(self, picture: Picture) -> str:
        """See `Captioner.key`: of the picture, its mask and the measure."""
        record = picture.record
        if self._complete(record):
            return caption_journal.key("attributes", VERSION, "own words")
        mask = record.mask and _hash(self.folder / record.mask)
        return caption_journal.key("attributes", VERSION, measure_version(), picture.sha256, mask)

    def answer(self, pictures: Sequence[Picture]) -> list[Answer]:
        """See `Captioner.answer`: `words` of what could be measured, and `by` mask or segmentation.

        Pictures whose records have all the words already are not opened.
        """
        tasks = [
            None if self._complete(one.record) else (self.folder, one.record) for one in pictures
        ]
        if self.jobs == 1:
            return [_measured(task) for task in tasks]
        return list(self._pool.map(_measured, tasks, chunksize=8))

    def captioned(self, record: Record, answer: Mapping[str, Any]) -> Record:
        """See `Captioner.captioned`. Words that an earlier run measured are measured words still:
        they give way to these, and a border's disappears where it is no longer asked for."""
        own = own_words(record)
        values = {name: tuple(v) if name == "colors" else v for name, v in answer["words"].items()}
        measured = {name: values[name] for name in self.words if name in values and name not in own}
        nothing: dict[str, Any] = {"asymmetry": None, "border": None, "colors": (), "size": None}
        worded = replace(record, **{**nothing, **own, **measured})
        lesion = worded.lesion if "border" in self.words else replace(worded.lesion, border=None)
        more = {name: value for name, value in record.more.items() if name != "measured"}
        by = answer["by"]
        if by is not None:
            more["measured"] = {"by": by, "attributes": list(measured), "measure": answer["with"]}
        more["caption"] = {
            "version": VERSION,
            "captioner": "attributes",
            "wording": WORDING,
            "label_blind": False,
            "measured_by": by,
        }
        return replace(worded, text=caption(lesion), more=more)

    def close(self) -> None:
        """End the processes, if any were started."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(cancel_futures=True)

    def _complete(self, record: Record) -> bool:
        return own_words(record).keys() >= set(self.words)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        # A fork would copy whatever locks the threads of numerical libraries hold.
        return ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"))


def own_words(record: Record) -> dict[str, Any]:
    """The words that came with a record: those that it has and no run of this module measured."""
    told = record.more.get("measured")
    ours = told.get("attributes", ()) if isinstance(told, Mapping) else ()
    values = {name: getattr(record, name) for name in WORDS if name not in ours}
    return {name: value for name, value in values.items() if value}


@cache
def measure_version() -> str:
    """A hash of the constants that words are measured by: another measure is another answer."""
    from dermaflux import attributes

    names = sorted(name for name in vars(attributes) if name.strip("_").isupper())
    constants = {
        name: value
        for name in names
        if isinstance(value := getattr(attributes, name), int | float | str | tuple)
    }
    return hashlib.sha256(repr(sorted(constants.items())).encode()).hexdigest()[:12]


def _measured(task: tuple[Path, Record] | None) -> Answer:
    """One picture, in whatever process."""
    from dermaflux import attributes

    nothing: dict[str, Any] = {"words": {}, "by": None, "with": measure_version()}
    if task is None:
        return nothing
    folder, record = task
    try:
        data = (folder / record.file_name).read_bytes()
        pixels = np.asarray(decode_upload(data, MAX_PIXELS), dtype=np.uint8)
        mask = None
        if record.mask is not None:
            mask = _mask((folder / record.mask).read_bytes(), (pixels.shape[0], pixels.shape[1]))
    except (ImageError, OSError) as error:
        return Failed(str(error))
    found = attributes.measure(pixels, mask)
    values = {
        "asymmetry": found.asymmetry_word,
        "border": found.border_word,
        "colors": list(found.colors),
        "size": found.size,
    }
    by = BY_SEGMENTATION if mask is None else BY_MASK
    return {**nothing, "words": {name: word for name, word in values.items() if word}, "by": by}


def _mask(data: bytes, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A mask of any size in the picture's proportions, bool [H, W].

    Raises:
        ImageError: it is no picture, or of other proportions.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"the mask cannot be read: {error}") from error
    height, width = shape
    if abs(grey.width * height / (grey.height * width) - 1) > _ASPECT:
        raise ImageError(
            f"the mask is {grey.width} x {grey.height} but the picture {width} x {height}; they "
            "need the same proportions"
        )
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey) > 127


def _hash(file: Path) -> str:
    """Of a file's bytes; of one that cannot be read, nothing: measuring it will say why."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
