"""Who scores photographs: a classifier in this process, or the one in a process of its own.

The app knows only `Scores`. Behind the service it is `serving.remote.Remote`, over BentoML's client
to `serving.scorer`; in tests, and where BentoML has no processes, it is `Local`.

    >>> scores = Local(beside(lambda: opened(bundle)))
    >>> await scores.score(Photograph(data=content))
    Result(answer=Answer(label='benign', ...), fault=None, ...)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from dermaflux.errors import DermaFluxError
from serving.scoring import Photograph, Result, Scoring

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADING: Final = "loading"
READY: Final = "ready"


@dataclass(frozen=True)
class Trouble:
    """Why no photograph can be scored now, and whether that passes by itself."""

    words: str
    passes: bool = True


class UnavailableError(DermaFluxError):
    """No photograph can be scored now."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.words)
        self.trouble = trouble


class Scores(Protocol):
    """What the app needs of a classifier."""

    def trouble(self) -> Trouble | None:
        """Why none can be had now; None where one can."""

    def note(self) -> str:
        """What its engine says of how it was opened; empty where nothing, or not yet."""

    async def score(self, photograph: Photograph) -> Result:
        """The result of one photograph; batches are made behind this.

        Raises:
            UnavailableError: it cannot be had now.
        """


class Local:
    """A classifier in this process, once it is opened; one photograph at a time."""

    def __init__(self, opening: Future[Scoring]) -> None:
        self._opening = opening
        self._pool = ThreadPoolExecutor(1, "score")

    def trouble(self) -> Trouble | None:
        return trouble_of(self._opening)

    def note(self) -> str:
        return self._opening.result().note if self.trouble() is None else ""

    async def score(self, photograph: Photograph) -> Result:
        trouble = self.trouble()
        if trouble is not None:
            raise UnavailableError(trouble)
        work = self._pool.submit(self._opening.result(), [photograph])
        (result,) = await asyncio.wrap_future(work)
        return result

    def close(self) -> None:
        """Take nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def trouble_of(opening: Future[Scoring]) -> Trouble | None:
    """How a classifier that is being opened stands."""
    if not opening.done():
        return Trouble("The classifier is being loaded.")
    error = opening.exception()
    if error is None:
        return None
    if isinstance(error, DermaFluxError):
        return Trouble(f"The classifier cannot be used: {error}", passes=False)
    return Trouble(
        "The classifier failed when it was loaded; the log of the service has it.", passes=False
    )


def beside(work: Callable[[], T], name: str = "open") -> Future[T]:
    """`work` in a thread of its own, which does not keep the process from ending."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            if not isinstance(error, DermaFluxError):
                logger.exception("%s failed", name)
            outcome.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return outcome
