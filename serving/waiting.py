"""Who waits, and who is next: callers take turns, whoever sent how much.

First come, first served gives the service to whoever sends most. Here each caller has a line of
its own, and the next image is that of the caller whose turn is longest ago. The queue is bounded in
all, and its last quarter is for callers who have nothing here yet: one who fills the rest does not
shut the others out.

    >>> waiting = Waiting()
    >>> waiting.put("ward 3", "a"), waiting.put("ward 3", "b"), waiting.put("clinic", "c")
    >>> list(waiting.order())
    ['a', 'c', 'b']
    >>> waiting.take(lambda item: True)
    'a'
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from typing import Generic, TypeVar, cast

T = TypeVar("T")

KEPT_FREE = 4
"""One place in so many is for callers who have nothing here."""


class Waiting(Generic[T]):
    """Items by caller, in the order of their turns. Whoever shares it between threads locks it."""

    def __init__(self) -> None:
        # In the order of turns: who was served goes to the end.
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, caller: str, item: T) -> None:
        """Behind what the caller has here already."""
        self._lines.setdefault(caller, deque()).append(item)
        self._count += 1

    def take(self, fits: Callable[[T], bool]) -> T | None:
        """The next item, or None where none of those in front of their lines `fits`.

        Who is passed by, because what is wanted does not fit now, stays in front.
        """
        for caller, line in self._lines.items():
            item = line[0]
            if fits(item):
                self._remove(caller, item)
                if caller in self._lines:
                    self._lines.move_to_end(caller)
                return item
        return None

    def discard(self, caller: str, item: T) -> bool:
        """Take an item out wherever it stands; False where it is not here."""
        if item not in self._lines.get(caller, ()):
            return False
        self._remove(caller, item)
        return True

    def order(self) -> Iterator[T]:
        """All items in the order in which they will be taken as long as each of them fits."""
        nothing = object()
        rounds = zip_longest(*self._lines.values(), fillvalue=nothing)
        return (cast(T, item) for item in chain.from_iterable(rounds) if item is not nothing)

    def _remove(self, caller: str, item: T) -> None:
        line = self._lines[caller]
        line.remove(item)
        self._count -= 1
        if not line:
            del self._lines[caller]


def taken(count: int, *, here: int, mine: int, places: int) -> bool:
    """Whether `count` images of a caller who has `mine` here may come to the `here` of all.

    Whoever comes to an empty house is taken: however many images one request may ask for, there
    is a time when it is answered.
    """
    if here == 0:
        return True
    return here + count <= places - (places // KEPT_FREE if mine else 0)
