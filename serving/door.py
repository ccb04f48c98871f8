"""How many requests with a body are answered at once, how many bytes of bodies are held, and how
much of both one caller may have: the bounds of memory before any queue is asked.

The last quarter is for others than whoever fills the rest, as in the queue of images
(`serving.waiting`): uploads that come slowly, or many programs of one caller, do not shut the
service for everybody. Bytes count as they come, not as they are announced.

    >>> door = Door(places=64, held_bytes=200_000_000)
    >>> with door.place("ward 3") as place:
    ...     place.hold(len(chunk))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from serving.replies import Refusal
from serving.waiting import KEPT_FREE


class Door:
    """Room for `places` requests and `held_bytes` of their bodies. For one event loop."""

    def __init__(self, places: int, held_bytes: int) -> None:
        self._places = places
        self._bytes = held_bytes
        self._inside: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    @contextmanager
    def place(self, lane: str) -> Iterator[Place]:
        """A place while a request of `lane` (a key, or an unknown address) is answered.

        Raises:
            Refusal: 429, all are taken, or all that one caller may have.
        """
        if self._inside.total() >= self._places:
            raise _crowded("Too many requests are being answered; come back in a second.")
        if self._inside[lane] >= _own(self._places):
            raise _crowded(f"{self._inside[lane]} requests of yours are being answered; wait.")
        place = Place(self, lane)
        self._inside[lane] += 1
        try:
            yield place
        finally:
            self._inside[lane] -= 1
            self._held[lane] -= place.held
            # The empty counts of whoever was here once would stay else.
            self._inside += Counter()
            self._held += Counter()

    def hold(self, lane: str, count: int) -> None:
        """See `Place.hold`."""
        if self._held.total() + count > self._bytes:
            raise _crowded("Too many bytes are being read or classified; come back in a second.")
        if self._held[lane] + count > _own(self._bytes):
            raise _crowded(f"{self._held[lane]:,} bytes of yours are being read or classified.")
        self._held[lane] += count


class Place:
    """One request's; what it holds counts until it is answered."""

    def __init__(self, door: Door, lane: str) -> None:
        self.held = 0
        self._door, self._lane = door, lane

    def hold(self, count: int) -> None:
        """Count so many bytes more.

        Raises:
            Refusal: 429, that is more than all together, or one caller, may hold.
        """
        self._door.hold(self._lane, count)
        self.held += count


def _own(all_there_is: int) -> int:
    return all_there_is - all_there_is // KEPT_FREE


def _crowded(words: str) -> Refusal:
    return Refusal(429, "busy", words, headers={"Retry-After": "1"})
