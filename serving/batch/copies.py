"""Which pictures of a job are another of its pictures again: the first stays, the others go.

Pictures with seeds of their own are no copies of each other unless the generator repeats itself:
of 300 of the embedded bundle with one caption, the most alike have 0.61, and 2 million pairs of
many captions have none from `duplicates.SAME` on. With one seed for several captions they may be:
a nevus and a melanoma of the same seed are one picture to `duplicates` in 8 of 12 cases. Whoever
wants such pairs turns this off (`copies: none`).

    >>> find([("0000000", Path("images/0000/0000000.png")), ...], threshold=0.7)
    {'0000712': ('0000031', 0.9312)}

`dermaflux.duplicates` compares; see there what it finds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermaflux import duplicates, thumbnails
from dermaflux.thumbnails import Index

log = logging.getLogger(__name__)
Alike = dict[int, dict[int, float]]
"""A picture's number -> those of earlier ones that it is like, and how much."""
_DIGITS = 4  # of a similarity: what is told decides


def find(
    pictures: Sequence[tuple[str, Path]],
    threshold: float = duplicates.SAME,
    threads: int = 2,
    shown: Any = iter,
) -> dict[str, tuple[str, float]]:
    """The copies among (name, file), in the order given: name -> the earlier one, and how alike.

    What cannot be read is no copy, and is told in the log; `look` gives the reasons. `shown` may
    wrap the loops in progress bars.

    Raises:
        ValueError: a threshold under `duplicates.SAME`: such pairs are not looked for.
    """
    built = look(pictures, threads, shown)
    for name, reason in built.broken.items():
        log.warning("%s was not compared with the others: %s", name, reason)
    return among(built.index, threshold, threads, shown)


def look(
    pictures: Sequence[tuple[str, Path]], threads: int = 2, shown: Any = iter
) -> thumbnails.Built:
    """An index of (name, file), and those that cannot be read, with why."""
    return thumbnails.build(((name, "", file) for name, file in pictures), threads, shown)


def among(
    index: Index, threshold: float = duplicates.SAME, threads: int = 2, shown: Any = iter
) -> dict[str, tuple[str, float]]:
    """The copies in an index, in its order: each with the most similar that stays before it.

    Two that stay are never alike by `threshold`, and what goes is alike to one that stays. 40,000
    pictures take two minutes of one core and 0.3 GB.

    Raises:
        ValueError: a threshold under `duplicates.SAME`: such pairs are not looked for.
    """
    if not duplicates.SAME <= threshold <= 1:
        raise ValueError(f"the threshold {threshold} is not from {duplicates.SAME} to 1")
    alike = _equal(index)
    copies = _first_stay(alike)
    asked = np.setdiff1d(np.arange(len(index)), list(copies))
    # `twins` looks at the nearest few of each picture. Where more than those are one, a second
    # look among the ones that stayed finds the rest.
    while True:
        new = False
        for twin in duplicates.twins(_part(index, asked), None, threads, shown):
            value = round(twin.similarity, _DIGITS)
            if value >= threshold:
                alike.setdefault(int(asked[twin.other]), {})[int(asked[twin.one])] = value
                new = True
        if not new:
            break
        copies = _first_stay(alike)
        paired = set(alike) | {earlier for others in alike.values() for earlier in others}
        asked = np.array(sorted(paired - set(copies)), dtype=np.int64)
    return {index.names[b]: (index.names[a], value) for b, (a, value) in sorted(copies.items())}


def _equal(index: Index) -> Alike:
    """Those whose thumbnails are an earlier one's to the bit: `twins` sees nothing in flat ones."""
    first: dict[bytes, int] = {}
    edges = np.searchsorted(index.owner, np.arange(len(index) + 1))
    alike: Alike = {}
    for number, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        earlier = first.setdefault(index.thumbs[start:end].tobytes(), number)
        if earlier != number:
            alike[number] = {earlier: 1.0}
    return alike


def _first_stay(alike: Alike) -> dict[int, tuple[int, float]]:
    """Those that go, with the most similar of the earlier ones that stay."""
    copies: dict[int, tuple[int, float]] = {}
    for number in sorted(alike):
        staying = [(-v, other) for other, v in alike[number].items() if other not in copies]
        if staying:
            value, other = min(staying)
            copies[number] = (other, -value)
    return copies


def _part(index: Index, numbers: NDArray[np.int64]) -> Index:
    """The pictures of these ascending numbers, as an index."""
    views = np.isin(index.owner, numbers)
    return Index(
        index.thumbs[views],
        np.searchsorted(numbers, index.owner[views]),
        tuple(index.names[number] for number in numbers),
        tuple(index.groups[number] for number in numbers),
    )
