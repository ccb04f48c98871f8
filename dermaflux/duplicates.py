"""Is this picture in that collection? Near-duplicates under all flips and right-angle turns.

Every lesion is a dark blob on skin, so the usual 64-bit perceptual hashes call strangers twins. Two
looks are taken here instead. The first is a hash of real numbers that no flip or turn changes: the
low 10 x 10 cosine coefficients of a 48-pixel thumbnail, weighted by their frequency, each paired
with its transpose, without signs. One matrix product per block of pictures gives the nearest few.
The second look lays each of those upon the picture (the best of eight turns, then an affine
alignment by Gauss-Newton) and correlates what is left when local brightness and local contrast
are divided out: hairs, network, texture, which no two lesions share.

Found so: copies that were resized, recompressed, brightened, squashed to another aspect, mirrored,
turned, cropped by some 5 to 10 %, or turned by a few degrees. Not found: another photograph of the
same lesion (that is what groups are for), a crop of half the picture.

    >>> seen = build(("train/1.jpg", "patient 7", Path("train/1.jpg")), ...).index
    >>> twins(build(test_files).index, seen)
    [Twin(one=3, other=71, similarity=0.93)]
    >>> nearest(seen, [Image.open("generated/7.png")], count=1)
    [[Near(name='train/1.jpg', group='patient 7', similarity=0.31)]]

Rates: `python -m training.duplicate_rates DATASET` measures them; see `SAME`.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux import alignment
from dermaflux.alignment import SIDE
from dermaflux.errors import DatasetError

Floats = NDArray[np.float32]
Thumbs = NDArray[np.uint8]
Views = NDArray[np.int64]
Block = TypeVar("Block")
Result = TypeVar("Result")

SAME: Final = 0.7
"""Similarity from which two pictures are one."""

_LOW: Final = 10
"""Cosine coefficients a side of the first look: fewer confuse lesions, more lose small crops."""
_ORIENTED: Final = 8
_CENTRE: Final = 0.93
"""Side of the second view of each picture: a crop of 7 % is its neighbour, others lie between."""
_FLOOR: Final = 0.85
"""First looks below it are no candidates; 99 of 100 crops by 5 % lie above 0.93."""
_TURNED_FLOOR: Final = 0.7
_CANDIDATES: Final = 16
_OBLONG: Final = 1.1
"""Aspect from which the centre square is a picture of its own: collections squash or cut it."""


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
        """Write one compressed `.npz`, whole or not at all."""
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                np.savez_compressed(
                    stream, thumbs=self.thumbs, owner=self.owner,
                    names=np.array(self.names, dtype=np.str_),
                    groups=np.array(self.groups, dtype=np.str_),
                )  # fmt: skip
            Path(temporary).chmod(0o644)
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

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
                names, groups = tuple(saved["names"].tolist()), tuple(saved["groups"].tolist())
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DatasetError(
                f"{file} is no index of pictures ({error}); make one with python -m training.data "
                "index DATASET --out FILE"
            ) from error
        fits = thumbs.ndim == 3 and thumbs.shape[1:] == (SIDE, SIDE) and thumbs.dtype == np.uint8
        whole = len(owner) == len(thumbs) and len(names) == len(groups)
        if (
            not fits
            or not whole
            or (len(owner) and not 0 <= owner.min() <= owner.max() < len(names))
        ):
            raise DatasetError(f"{file} is an index of another version; make it again")
        return cls(thumbs, owner.astype(np.int64), names, groups)


@dataclass(frozen=True)
class Twin:
    """Two pictures that are one: their numbers in the two indexes, and how alike, 0.7 to 1."""

    one: int
    other: int
    similarity: float


@dataclass(frozen=True)
class Near:
    """A picture of an index beside one that was asked for; `similarity` is -1 to 1."""

    name: str
    group: str
    similarity: float


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
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return str(error) or type(error).__name__

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


def joined(indexes: Sequence[Index]) -> Index:
    """Several indexes as one, in their order."""
    starts = np.cumsum([0, *(len(one) for one in indexes)])
    return Index(
        np.concatenate([one.thumbs for one in indexes]),
        np.concatenate([one.owner + start for one, start in zip(indexes, starts, strict=False)]),
        tuple(name for one in indexes for name in one.names),
        tuple(group for one in indexes for group in one.groups),
    )


def twins(
    one: Index, other: Index | None = None, threads: int = 2, shown: Any = iter
) -> list[Twin]:
    """The pairs that are one picture, of two indexes or within one (there `one < other`).

    Time is three matrix products of [views, 54] by [54, views] and some 1 ms a candidate, of which
    a picture has up to ten. Memory is thrice 216 B a view and some 100 MB. `shown` may wrap the
    loop over blocks in a progress bar.
    """
    within = other is None
    against = one if other is None else other

    def compare(block: tuple[Views, Views]) -> list[tuple[int, int, float]]:
        left, right = block
        values = _similarity(one.thumbs[left], against.thumbs[right])
        good = np.flatnonzero(values >= SAME)
        places = zip(one.owner[left[good]], against.owner[right[good]], strict=True)
        return [(int(a), int(b), float(v)) for (a, b), v in zip(places, values[good], strict=True)]

    best: dict[tuple[int, int], float] = {}
    with ThreadPoolExecutor(threads) as pool:
        blocks = _candidates(one, against, within, _CANDIDATES, _FLOOR)
        for a, b, value in (
            pair for found in shown(_eager(pool, compare, blocks)) for pair in found
        ):
            pair = (min(a, b), max(a, b)) if within else (a, b)
            best[pair] = max(best.get(pair, 0.0), value)
    return [Twin(*pair, value) for pair, value in sorted(best.items())]


def _eager(
    pool: ThreadPoolExecutor, work: Callable[[Block], Result], items: Iterator[Block]
) -> Iterator[Result]:
    """`pool.map`, but never more than a few items ahead of who asks: they are large."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 8:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def nearest(index: Index, images: Sequence[Image.Image], count: int = 4) -> list[list[Near]]:
    """For each image the `count` most similar pictures of the index, best first.

    Those below `SAME` are mere neighbours; a report on memorisation may show them.
    """
    seen = [views(image) for image in images]
    owner = np.repeat(np.arange(len(seen)), [len(one) for one in seen])
    thumbs = np.stack([thumb for one in seen for thumb in one]) if seen else index.thumbs[:0]
    asked = Index(thumbs, owner, ("",) * len(seen), ("",) * len(seen))
    best: list[dict[int, float]] = [{} for _ in seen]
    for left, right in _candidates(asked, index, False, max(_CANDIDATES, 2 * count), -1.0):
        values = _similarity(asked.thumbs[left], index.thumbs[right], floor=-1.0)
        for a, b, value in zip(owner[left], index.owner[right], values, strict=True):
            best[a][int(b)] = max(best[a].get(int(b), -1.0), float(value))
    ordered = [sorted(one.items(), key=lambda item: (-item[1], item[0]))[:count] for one in best]
    return [[Near(index.names[b], index.groups[b], v) for b, v in one] for one in ordered]


def united(groups: Sequence[str], pairs: Iterable[tuple[int, int]]) -> list[str]:
    """Group names after the groups of each pair became one: its alphabetically first name.

    `pairs` are numbers into `groups`. A picture is in one group before and after; who shared a
    group still does.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.get(name, name)) != name:
            parent[name] = parent.get(above, above)
            name = above
        return name

    for a, b in pairs:
        one, other = sorted((root(groups[a]), root(groups[b])))
        parent[other] = one
    return [root(name) for name in groups]


def _candidates(
    one: Index, other: Index, within: bool, count: int, floor: float
) -> Iterator[tuple[Views, Views]]:
    """View numbers of pairs that may be one picture, in blocks of at most 256 views of `one`."""
    if not len(one.thumbs) or not len(other.thumbs):
        return
    mine, mine_centre = _features(one.thumbs), _features(one.thumbs, _CENTRE)
    theirs = (mine, mine_centre) if within else (
        _features(other.thumbs), _features(other.thumbs, _CENTRE))  # fmt: skip
    count = min(count, len(other.thumbs))
    # Three products are held at once: some 100 MB.
    height = max(8, min(256, 2**23 // len(other.thumbs)))
    for start in range(0, len(mine), height):
        rows = slice(start, start + height)
        scores = mine[rows] @ theirs[0].T
        np.maximum(scores, mine[rows] @ theirs[1].T, out=scores)
        np.maximum(scores, mine_centre[rows] @ theirs[0].T, out=scores)
        if within:
            scores[one.owner[rows, None] == other.owner[None]] = -2.0
        top = np.argpartition(scores, -count, axis=1)[:, -count:]
        good = np.take_along_axis(scores, top, 1) >= floor
        left, place = np.nonzero(good)
        yield left + start, top[left, place]


def _features(thumbs: Thumbs, part: float = 1.0) -> Floats:
    """What no flip or right-angle turn changes, of unit length: [views, 54]."""
    return np.concatenate(
        [_invariant(alignment.cosines(thumbs[at : at + 4096], _LOW, part))
         for at in range(0, len(thumbs), 4096)]
    )  # fmt: skip


def _invariant(coefficients: Floats) -> Floats:
    rows, columns = np.triu_indices(_LOW)
    value = np.hypot(coefficients[:, rows, columns], coefficients[:, columns, rows])
    value[:, rows == columns] /= np.sqrt(2)
    return alignment.unit(value[:, 1:])


def _similarity(one: Thumbs, other: Thumbs, floor: float = _TURNED_FLOOR) -> Floats:
    """How alike pairs of thumbnails are at the best of eight turns, aligned: [pairs], -1 to 1.

    -1 where the best turn alone is less alike than `floor`.
    """
    found = np.full(len(one), -1.0, np.float32)
    for at in range(0, len(one), 128):
        a, b = one[at : at + 128], other[at : at + 128]
        turn, value = _turn(a, b)
        near = np.flatnonzero(value >= floor)
        if len(near):
            turned = alignment.turned(b[near], turn[near])
            found[at + near] = alignment.correlation(a[near], turned)
    return found


def _turn(one: Thumbs, other: Thumbs) -> tuple[NDArray[np.int64], Floats]:
    """The best of the eight turns of `other`, and the similarity there."""
    low = (alignment.cosines(one, _ORIENTED), alignment.cosines(one, _ORIENTED, _CENTRE))
    mine, mine_centre = (alignment.unit(value.reshape(len(one), -1)[:, 1:]) for value in low)
    low = (alignment.cosines(other, _ORIENTED), alignment.cosines(other, _ORIENTED, _CENTRE))
    values = []
    for turn in range(8):
        theirs, theirs_centre = (
            alignment.unit(alignment.turned_cosines(value, turn).reshape(len(one), -1)[:, 1:])
            for value in low
        )
        pairs = ((mine, theirs), (mine, theirs_centre), (mine_centre, theirs))
        values.append(np.max([(a * b).sum(1) for a, b in pairs], axis=0))
    stack = np.stack(values)
    return stack.argmax(0), stack.max(0)
