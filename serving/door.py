"""How many requests with a body are answered at once, so that memory is bounded before any queue is
asked, and how many of them one caller may have.

The last quarter of the places is for others than whoever fills the rest, as in the queue of images
(`serving.waiting`): uploads that come slowly, or nobody in particular with many programs, do not
shut the service for everybody.

    >>> door = Door(64)
    >>> with door.place("ward 3"): ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from serving.replies import Refusal
from serving.waiting import KEPT_FREE


class Door:
    """Places for `places` requests. For one event loop."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._own = places - places // KEPT_FREE
        self._inside: Counter[str] = Counter()

    @contextmanager
    def place(self, lane: str) -> Iterator[None]:
        """A place while a request of `lane` (a key, or an unknown address) is answered.

        Raises:
            Refusal: 429, all are taken, or all that one caller may have.
        """
        if self._inside.total() >= self._places:
            _refuse("Too many requests are being answered; come back in a second.")
        if self._inside[lane] >= self._own:
            _refuse(f"{self._own} requests of yours are being answered; wait for one of them.")
        self._inside[lane] += 1
        try:
            yield
        finally:
            self._inside[lane] -= 1
            # The empty count of whoever was here once would stay else.
            self._inside += Counter()


def _refuse(words: str) -> NoReturn:
    raise Refusal(429, "busy", words, headers={"Retry-After": "1"})
