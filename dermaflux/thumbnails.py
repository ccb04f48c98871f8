"""Thumbnails of pictures, kept so that copies are known later: an index of a collection.

2.3 KB of luminance a picture: half a million take 1.2 GB before compression. They are pictures
still, if small, so an index is under the terms of the data that it was made of.
`dermaflux.duplicates` compares them.

    >>> built = build([("a.jpg", "patient 7", Path("train/a.jpg"))])
    >>> built.index.save(Path("seen.npz"))
    >>> len(Index.load(Path("seen.npz")))
    1
"""

from __future__ import annotations

import lzma
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux import files
from dermaflux.alignment import SIDE
from dermaflux.dataset import writing
from dermaflux.errors import DatasetError

Thumbs = NDArray[np.uint8]

_OBLONG: Final = 1.1
"""Aspect from which the centre square is a picture of its own: collections squash or cut it."""
UNREADABLE: Final = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, OverflowError,
    IndexError, KeyError, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises of damaged pictures: its decoders pass on what they stumble over."""
_DAMAGED: Final = (
    OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError, RuntimeError,
    NotImplementedError, SyntaxError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
    tokenize.TokenError,
)  # fmt: skip
"""What zipfile and numpy raise of damaged archives: flipped bits may change sizes and methods."""


@dataclass(frozen=True)
class Index:
    """What is kept of pictures so that their copies are known: 2.3 KB each, oblong ones twice.

    `thumbs` is [views, 48, 48] luminance; `owner` [views] the number of each view's picture;
    `names` and `groups` are the pictures'.
    """

    thumbs: Thumbs
    owner: NDArray[np.int64]
    names: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def save(self, file: Path) -> None:
        """Write one compressed `.npz`, whole or not at all.

        Raises:
            DatasetError: the folder is not there or takes no files, or the disk is full.
        """
        with writing(file), files.replacing(file) as stream:
            np.savez_compressed(
                stream, thumbs=self.thumbs, owner=self.owner,
                names=np.array(self.names, dtype=np.str_),
                groups=np.array(self.groups, dtype=np.str_),
            )  # fmt: skip

    @classmethod
    def load(cls, file: Path) -> Index:
        """Read what `save` wrote.

        Raises:
            DatasetError: it is not there, or no such file.
        """
        try:
            if not zipfile.is_zipfile(file):
                raise ValueError("no file of numpy arrays")
            with np.load(file, allow_pickle=False) as saved:
                thumbs, owner = saved["thumbs"], saved["owner"]
                words = saved["names"], saved["groups"]
        except _DAMAGED as error:
            raise DatasetError(
                f"{file} is no index of pictures ({error or type(error).__name__}); make one with "
                "python -m training.data index DATASET --out FILE"
            ) from error
        fits = thumbs.ndim == 3 and thumbs.shape[1:] == (SIDE, SIDE) and thumbs.dtype == np.uint8
        listed = all(one.ndim == 1 and one.dtype.kind == "U" for one in words)
        whole = owner.ndim == 1 and owner.dtype.kind in "iu" and len(owner) == len(thumbs)
        if (
            not fits
            or not listed
            or not whole
            or len(words[0]) != len(words[1])
            or (len(owner) and not 0 <= owner.min() <= owner.max() < len(words[0]))
        ):
            raise DatasetError(f"{file} is an index of another version; make it again")
        names, groups = (tuple(one.tolist()) for one in words)
        return cls(thumbs, owner.astype(np.int64), names, groups)


@dataclass(frozen=True)
class Built:
    """An index, and the pictures that could not be read with the reason."""

    index: Index
    broken: dict[str, str] = field(default_factory=dict)


def views(image: Image.Image) -> list[Thumbs]:
    """The thumbnails of a picture, each [48, 48]: squashed whole, and its centre where oblong."""
    grey = image.convert("L")
    boxes = [(0, 0, *grey.size)]
    short, long = sorted(grey.size)
    if long > short * _OBLONG:
        left, top = (grey.width - short) // 2, (grey.height - short) // 2
        boxes.append((left, top, left + short, top + short))
    box = Image.Resampling.BOX
    return [np.asarray(grey.resize((SIDE, SIDE), box, box=one), np.uint8) for one in boxes]


def build(pictures: Iterable[tuple[str, str, Path]], threads: int = 2, shown: Any = iter) -> Built:
    """An index of (name, group, file). `shown` may wrap the loop in a progress bar.

    Large JPEGs are decoded at a fraction of their size.
    """
    listed = list(pictures)

    def look(file: Path) -> list[Thumbs] | str:
        try:
            with Image.open(file) as image:
                image.draft("L", (4 * SIDE, 4 * SIDE))
                return views(image)
        except UNREADABLE as error:
            return why(error)

    thumbs: list[Thumbs] = []
    owner: list[int] = []
    kept: list[tuple[str, str]] = []
    broken: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        looks = pool.map(look, (file for _, _, file in listed))
        for (name, group, _), seen in zip(listed, shown(looks), strict=True):
            if isinstance(seen, str):
                broken[name] = seen
                continue
            thumbs += seen
            owner += [len(kept)] * len(seen)
            kept.append((name, group))
    stack = np.stack(thumbs) if thumbs else np.zeros((0, SIDE, SIDE), np.uint8)
    names, groups = tuple(name for name, _ in kept), tuple(group for _, group in kept)
    return Built(Index(stack, np.array(owner, dtype=np.int64), names, groups), broken)


def why(error: Exception) -> str:
    """Why a picture cannot be read, the same in every run: Pillow names streams by their address.

    >>> why(OSError("cannot identify image file <_io.BytesIO object at 0x7f31>"))
    'cannot identify image file'
    """
    return re.sub(r" ?<\S+ object at 0x[0-9a-fA-F]+>", "", str(error)) or type(error).__name__


def joined(indexes: Sequence[Index]) -> Index:
    """Several indexes as one, in their order."""
    starts = np.cumsum([0, *(len(one) for one in indexes)])
    return Index(
        np.concatenate([one.thumbs for one in indexes]),
        np.concatenate([one.owner + start for one, start in zip(indexes, starts, strict=False)]),
        tuple(name for one in indexes for name in one.names),
        tuple(group for one in indexes for group in one.groups),
    )
