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

    >>> seen = thumbnails.build([("train/1.jpg", "patient 7", Path("train/1.jpg")), ...]).index
    >>> twins(thumbnails.build(test_files).index, seen)
    [Twin(one=3, other=71, similarity=0.93)]
    >>> nearest(seen, [Image.open("generated/7.png")], count=1)
    [[Near(name='train/1.jpg', group='patient 7', similarity=0.31)]]

Rates: `python -m training.duplicate_rates DATASET` measures them; see `SAME`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux import alignment
from dermaflux.thumbnails import Index, Thumbs, views

Floats = NDArray[np.float32]
Views = NDArray[np.int64]
Block = TypeVar("Block")
Result = TypeVar("Result")

SAME: Final = 0.7
"""Similarity from which two pictures are one.

Measured by `python -m training.duplicate_rates` on HAM10000 (6,948 pictures of 224 pixels) and ISIC
2017 (2,847), 1,000 altered copies of each. Missed of HAM10000's and ISIC 2017's copies: 0.1 and 0.0
% recompressed at quality 30, none that were shrunk, squashed, flipped or turned, 0.1 and 1.9 % made
lighter (until they clip), 0.2 and 0.4 % turned by 3 degrees, 0.0 and 0.1 % cropped by 3 %, 0.9 and
1.1 % by 5 %, but 18 and 20 % where 10 % was cropped off one corner. False alarms: none of 28
million pairs. 38 were found across groups, and all are true copies to the eye; the most alike
strangers (other lesions in the same round frame) reach 0.61.
"""

_LOW: Final = 10
"""Cosine coefficients a side of the first look: fewer confuse lesions, more lose small crops."""
_ORIENTED: Final = 8
_CENTRE: Final = 0.93
"""Side of the second view of each picture: a crop of 7 % is its neighbour, others lie between."""
_FLOOR: Final = 0.85
"""First looks below it are no candidates; 99 of 100 crops by 5 % lie above 0.93."""
_TURNED_FLOOR: Final = 0.7
_CANDIDATES: Final = 48
_ALIGNED: Final = 12
"""Of a picture's nearest 48 at the first look, the 12 nearest at their best turn are aligned."""


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


def twins(
    one: Index, other: Index | None = None, threads: int = 2, shown: Any = iter
) -> list[Twin]:
    """The pairs that are one picture, of two indexes or within one (there `one < other`).

    Time is three matrix products of [views, 54] by [54, views] and some 3 ms a picture. Memory is
    thrice 216 B a view and some 100 MB. `shown` may wrap the loop over blocks in a progress bar.
    """
    within = other is None
    against = one if other is None else other

    def compare(block: tuple[Views, Views]) -> list[tuple[int, int, float]]:
        left, right = block
        left, right, values = _compared(
            one.thumbs, against.thumbs, left, right, _TURNED_FLOOR, _ALIGNED
        )
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


@dataclass(frozen=True)
class First:
    """The first look at an index, for who asks it often: of whole pictures and of their centres.

    [views, 54] each. It takes some 10 ms a thousand pictures; what follows does not, nearly.
    """

    whole: Floats
    centre: Floats


def first(index: Index) -> First:
    """The first look at an index, to hand to `nearest`."""
    return First(_features(index.thumbs), _features(index.thumbs, _CENTRE))


def nearest(
    index: Index, images: Sequence[Image.Image], count: int = 4, known: First | None = None
) -> list[list[Near]]:
    """For each image the `count` most similar pictures of the index, best first.

    Those below `SAME` are mere neighbours; a report on memorisation may show them. `known` is
    `first(index)`, which is made anew where it is not given.
    """
    seen = [views(image) for image in images]
    owner = np.repeat(np.arange(len(seen)), [len(one) for one in seen])
    thumbs = np.stack([thumb for one in seen for thumb in one]) if seen else index.thumbs[:0]
    asked = Index(thumbs, owner, ("",) * len(seen), ("",) * len(seen))
    best: list[dict[int, float]] = [{} for _ in seen]
    count_first = max(_CANDIDATES, 4 * count)
    for left, right in _candidates(asked, index, False, count_first, -1.0, known):
        left, right, values = _compared(
            thumbs, index.thumbs, left, right, -1.0, max(_ALIGNED, 2 * count)
        )
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
    one: Index, other: Index, within: bool, count: int, floor: float, known: First | None = None
) -> Iterator[tuple[Views, Views]]:
    """View numbers of pairs that may be one picture, in blocks of at most 256 views of `one`."""
    if not len(one.thumbs) or not len(other.thumbs):
        return
    mine = first(one)
    theirs = mine if within else known or first(other)
    count = min(count, len(other.thumbs))
    # Three products are held at once: some 100 MB.
    height = max(8, min(256, 2**23 // len(other.thumbs)))
    for start in range(0, len(mine.whole), height):
        rows = slice(start, start + height)
        scores = mine.whole[rows] @ theirs.whole.T
        np.maximum(scores, mine.whole[rows] @ theirs.centre.T, out=scores)
        np.maximum(scores, mine.centre[rows] @ theirs.whole.T, out=scores)
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


def _compared(
    one: Thumbs, other: Thumbs, left: Views, right: Views, floor: float, count: int
) -> tuple[Views, Views, Floats]:
    """The pairs that were aligned, and how alike they are then, -1 to 1.

    Of the candidates of each view of `one`, those are that at the best of eight turns are alike by
    `floor`, and of these the best `count`.
    """
    parts = [slice(at, at + 512) for at in range(0, len(left), 512)]
    turns = [_turn(one[left[part]], other[right[part]]) for part in parts]
    if not turns:
        return left, right, np.zeros(0, np.float32)
    turn, value = (np.concatenate(part) for part in zip(*turns, strict=True))
    order = np.lexsort((-value, left))
    first = np.searchsorted(left[order], left[order])
    good = order[(np.arange(len(order)) - first < count) & (value[order] >= floor)]
    found = [
        alignment.correlation(one[left[some]], alignment.turned(other[right[some]], turn[some]))
        for some in (good[at : at + 128] for at in range(0, len(good), 128))
    ]
    return left[good], right[good], np.concatenate([np.zeros(0, np.float32), *found])


def _turn(one: Thumbs, other: Thumbs) -> tuple[NDArray[np.int64], Floats]:
    """The best of the eight turns of `other`, and the similarity there."""
    mine, mine_centre = (_oriented(one, part) for part in (1.0, _CENTRE))
    theirs, theirs_centre = (_oriented(other, part) for part in (1.0, _CENTRE))
    values = []
    for turn in range(8):
        whole = alignment.turned_cosines(theirs, turn)
        centre = alignment.turned_cosines(theirs_centre, turn)
        pairs = ((mine, whole), (mine, centre), (mine_centre, whole))
        values.append(np.max([np.einsum("nij,nij->n", a, b) for a, b in pairs], axis=0))
    stack = np.stack(values)
    return stack.argmax(0), stack.max(0)


def _oriented(thumbs: Thumbs, part: float) -> Floats:
    """Cosine coefficients of unit length, which turn as the picture does: [views, 8, 8]."""
    low = alignment.cosines(thumbs, _ORIENTED, part)
    return alignment.unit(low.reshape(len(low), -1)).reshape(low.shape)
