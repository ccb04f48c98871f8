"""How many photographs may be in work or waiting, and when to come back where they are too many.

>>> places = Places(128)
>>> with places.taken(32): ...      # raises Refusal 429 where there are not so many
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from serving.replies import Refusal

FIRST_GUESS_SECONDS: Final = 0.1
"""How long a photograph takes before one was measured."""


class Places:
    """Photographs in work or waiting, at most `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._usual_seconds = FIRST_GUESS_SECONDS

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Hold that many places.

        Raises:
            Refusal: 429 with `Retry-After`, there are not so many.
        """
        if self._count + count > self._most and self._count:
            # When those that are here now will have gone.
            wait = max(1, math.ceil(self._usual_seconds))
            raise Refusal(
                429,
                "busy",
                f"{self._count} of {self._most} places for photographs are taken; come back in "
                f"about {wait} seconds.",
                headers={"Retry-After": str(wait)},
            )
        self._count += count
        try:
            yield
        finally:
            self._count -= count

    def took(self, seconds: float) -> None:
        """Learn how long one takes, its wait included: a moving average."""
        self._usual_seconds += 0.1 * (seconds - self._usual_seconds)
