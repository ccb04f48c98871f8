"""The night's loop on one machine: one batch is denoised while the one before is written.

>>> with Journal.open(folder.machinery, "1-of-1") as journal:
...     work(maker, Store(folder, journal), tries, batch=8, attempts=1, seed=0)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from dermaflux.errors import EngineError
from dermaflux.flow import Floats
from serving.batch.deaths import HOPELESS, Deaths
from serving.batch.journal import Entry
from serving.batch.maker import Made, Maker, Try
from serving.batch.store import Store

_AHEAD: Final = 2
"""Batches that may wait to be developed: more only hold memory, for one writer is quick enough."""
_TURNS: Final = 16
"""Batches that are drawn together where parts take turns in memory, since each turn loads them."""
_NEVER: Final = 32
"""Tries that may fail one after another before it is the engine, where none has succeeded yet."""
_NO_MORE: Final = 512
"""The same after one has: there may be many bad items, but hardly so many in one place."""


class Count:
    """What came of the tries so far, and whether to give up; counts from when drawing begins."""

    def __init__(self) -> None:
        self.kept = self.rejected = self.failed = 0
        self._failing = 0
        self._began = time.monotonic()
        self.seconds = 0.0

    def add(self, entry: Entry) -> None:
        """Count an entry.

        Raises:
            EngineError: so many failed one after another that the rest would too.
        """
        setattr(self, entry.state, getattr(self, entry.state) + 1)
        self.seconds = time.monotonic() - self._began
        self._failing = self._failing + 1 if entry.state == "failed" else 0
        if self._failing >= (_NO_MORE if self.kept or self.rejected else _NEVER):
            raise EngineError(
                f"the last {self._failing} pictures all failed, the last with: {entry.reasons[0]}. "
                "Mend that and run the same command again; failed pictures are tried anew"
            )


def work(
    maker: Maker,
    store: Store,
    tries: Iterable[Try],
    *,
    batch: int | None,
    attempts: int,
    seed: int,
    cancelled: Callable[[], bool] | None = None,
    settled: Callable[[Entry], None] | None = None,
    deaths: Deaths | None = None,
) -> Count:
    """Make all tries and, of rejected items, their next ones. What is begun is written.

    `batch` is the most pictures that are denoised together, what fits if None. `settled` is called
    with the last entry of each item. `deaths` tells whom earlier processes died over.

    Raises:
        Cancelled: the caller asked to stop; all that was denoised before is written.
        DiskFull, EngineError: see `Store.write` and `Count.add`.
    """
    waiting = Waiting(maker, tries, batch, deaths)
    count = Count()

    def account(entries: Sequence[Entry], members: Sequence[Try]) -> None:
        for entry, one in zip(entries, members, strict=True):
            count.add(entry)
            if following := after(entry.state, one, attempts, seed):
                waiting.put(following)
            elif settled is not None:
                settled(entry)
        if deaths is not None:
            deaths.end(one.item.name for one in members)

    pool = ThreadPoolExecutor(1, thread_name_prefix="develop")
    running: deque[tuple[Future[list[Entry]], list[Try]]] = deque()
    ahead = 0 if maker.in_turns else _AHEAD
    try:
        while True:
            members = waiting.take()
            while running and (running[0][0].done() or len(running) > ahead or not members):
                future, drawn = running.popleft()
                account(future.result(), drawn)
                members = members or waiting.take()
            if not members:
                return count
            if deaths is not None:
                if deaths.hopeless(members[0].item.name):
                    account(store.write([_given_up(maker, members[0])]), members)
                    continue
                deaths.begin(one.item.name for one in members)
            latents = maker.denoise(members, cancelled)
            job = pool.submit(_finished, maker, store, members, latents)
            running.append((job, members))
            if maker.in_turns:
                job.result()
    finally:
        # Whatever ended the loop, what is denoised gets written, and its own error is not lost.
        pool.shutdown()
        if deaths is not None:
            deaths.close()


def after(state: str, one: Try, attempts: int, seed: int) -> Try | None:
    """The next try of an item, if this one was rejected and one is left."""
    number = one.attempt + 1
    if state != "rejected" or number >= attempts or one.item.fixed:
        return None
    return Try(one.item, number, one.item.attempt(number, seed))


def _finished(
    maker: Maker, store: Store, tries: Sequence[Try], latents: Sequence[Floats | str]
) -> list[Entry]:
    return store.write(maker.develop(tries, latents))


def _given_up(maker: Maker, one: Try) -> Made:
    return Made(one, maker.engine, error=f"its process died {HOPELESS} times while it was drawn")


class Waiting:
    """Tries that wait to be denoised, by size, since a batch is of one size."""

    def __init__(
        self, maker: Maker, tries: Iterable[Try], batch: int | None, deaths: Deaths | None = None
    ) -> None:
        self._deaths = deaths
        self._most = batch
        self._maker = maker
        self._again: deque[Try] = deque()
        self._rest: Iterator[Try] = iter(tries)
        self._sizes: dict[tuple[int, int], deque[Try]] = {}

    def put(self, one: Try) -> None:
        """Take a further try in, before those that have not begun."""
        self._again.append(one)

    def take(self) -> list[Try]:
        """The next batch: the first that is full, or the fullest when no try is left."""
        while (one := self._next()) is not None:
            if self._deaths is not None and self._deaths.alone(one.item.name):
                return [one]
            size = (one.request.height, one.request.width)
            alike = self._sizes.setdefault(size, deque())
            alike.append(one)
            if len(alike) >= self._limit(size):
                return list(self._sizes.pop(size))
        if not self._sizes:
            return []
        size = max(self._sizes, key=lambda size: len(self._sizes[size]))
        return list(self._sizes.pop(size))

    def _next(self) -> Try | None:
        return self._again.popleft() if self._again else next(self._rest, None)

    def _limit(self, size: tuple[int, int]) -> int:
        if self._most is not None and not self._maker.in_turns:
            return self._most
        try:
            fits = self._maker.pipeline.batch(*size)
        except EngineError:
            return 1  # it is told as the failure of this item, when its turn comes
        return fits * (_TURNS if self._maker.in_turns else 1)
