"""How fast images are drawn, as measured lately: for `Retry-After` and for those who wait.

Images differ in size and steps, so the measure is of pixels times steps: one that grows faster in
large images than in small ones, but is one number, and near enough to say when to come back.

    >>> pace = Pace()
    >>> pace.learn(seconds=0.5, work=2 * 128 * 128)
    >>> pace.seconds(20 * 128 * 128)
    5.0
"""

from __future__ import annotations

FIRST_GUESS_SECONDS = 5.0
"""What anything takes before something was measured."""
FADES = 0.99
"""What a turn of the generator weighs after the next one: the last hundred or so count."""


class Pace:
    """Seconds for work. Whoever shares it between threads locks it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._work = 0.0

    def learn(self, seconds: float, work: float) -> None:
        """So much work took so long."""
        self._seconds = FADES * self._seconds + seconds
        self._work = FADES * self._work + work

    def seconds(self, work: float) -> float:
        """How long so much work will take."""
        if not self._work:
            return FIRST_GUESS_SECONDS if work else 0.0
        return self._seconds / self._work * work
