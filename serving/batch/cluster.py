"""The same job on a Ray cluster: actors that hold engines, and one process that writes.

Ray Data spreads blocks of items over a pool of actors, restarts an actor that died and draws its
block again. Finished pictures stream back to the process that asked, which writes them as it
does its own: so no folder need be shared for the results, and the journal has one writer. Every
node has the bundle at the same path (and dermaflux with its extra `batch` and Ray installed).

A block over which its process dies again and again, because a picture exhausts memory, say, is left
out, its items are drawn each alone, and an item that still ends its process has failed. Ray itself
has a process of its own (`serving.batch.connection`); where that dies, another draws what is left.

    python -m serving.batch requests.jsonl --out generated --ray --workers 2        # a cluster here
    python -m serving.batch requests.jsonl --out generated --ray 10.0.0.1:6379 --workers 8
    python -m serving.batch requests.jsonl --out generated --ray auto    # on a machine of a cluster
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dermaflux.errors import Cancelled, EngineError
from serving.batch.actor import DEATHS, Drawn
from serving.batch.connection import BlocksLost, Driver, DriverDied, joined, told
from serving.batch.job import Folder
from serving.batch.journal import Entry
from serving.batch.maker import Made, Tools, Try
from serving.batch.settings import Settings
from serving.batch.store import Store
from serving.batch.work import Count

log = logging.getLogger(__name__)

_DEFAULT_BATCH: Final = 8
_ALONE: Final = 32
"""Items that are drawn alone at a time; when so many may be lost, no more blocks are tried."""
_DRIVERS: Final = 3
"""Processes of Ray's own that a command may lose."""


def work_on_ray(
    settings: Settings,
    tools: Tools,
    folder: Folder,
    store: Store,
    left: Sequence[Try],
    *,
    cancelled: Callable[[], bool],
    settled: Callable[[Entry], None],
) -> Count:
    """`work.work` over a cluster.

    Raises:
        EngineError: Ray is not installed, the cluster cannot be reached, no actor can start, Ray's
            own process dies again and again, or all pictures fail.
        Cancelled: the caller asked to stop; all that came back before is written.
        DiskFull: see `Store.write`.
    """
    taken = _Taken(folder, store, cancelled, settled)
    died = 0
    while left := taken.without(left):
        try:
            with joined(settings) as driver:
                _draw(driver, settings, tools, left, taken)
        except EngineError as error:
            if cancelled():
                # Schedulers send their signal to all processes, Ray's too.
                raise Cancelled("stopped") from error
            died += 1
            if not isinstance(error, DriverDied) or died >= _DRIVERS:
                raise
            log.warning("%s: another draws what is left", error)
    return taken.count


def _draw(
    driver: Driver, settings: Settings, tools: Tools, left: Sequence[Try], taken: _Taken
) -> None:
    """Draw all that are left, or find out why they cannot be drawn."""
    batch = settings.batch or _DEFAULT_BATCH
    while left:
        try:
            taken.all(driver.draw(tools, left, batch, lost=max(1, _ALONE // batch)))
        except BlocksLost as error:
            log.info("processes die again and again: %s", error)
        left = taken.without(left)
        # What was lost is among the first: blocks are begun in the order of their items.
        alone, left = left[:_ALONE], left[_ALONE:]
        if alone:
            log.warning(
                "processes died %d times over some of %d pictures: each of these is drawn "
                "alone, %s to %s", DEATHS, len(alone), alone[0].item.name, alone[-1].item.name,
            )  # fmt: skip
            taken.all(driver.draw(tools, alone, 1, lost=-1))
            words = f"its process died {DEATHS} times, also when it was drawn alone"
            for one in taken.without(alone):
                taken.one([Made(one, taken.engine, error=words)])


@dataclass
class _Taken:
    """Writes what comes back, and knows of whom something did."""

    folder: Folder
    store: Store
    cancelled: Callable[[], bool]
    settled: Callable[[Entry], None]
    count: Count = field(default_factory=Count)
    engine: str = ""
    _engines: set[str] = field(default_factory=set)
    _names: set[str] = field(default_factory=set)

    def all(self, blocks: Iterable[bytes]) -> None:
        for data in blocks:
            self._take(pickle.loads(data))
            if self.cancelled():
                raise Cancelled("stopped")

    def one(self, made: Sequence[Made]) -> None:
        """All tries of an item."""
        entries = self.store.write(made)
        self._names.add(entries[-1].name)
        for entry in entries:
            self.count.add(entry)
        self.settled(entries[-1])

    def without(self, tries: Sequence[Try]) -> list[Try]:
        """Those of whom nothing came back."""
        return [one for one in tries if one.item.name not in self._names]

    def _take(self, drawn: Drawn) -> None:
        if drawn.mistake:
            log.error("a worker's error:\n%s", drawn.mistake)
            raise EngineError(f"the cluster cannot draw: {told(drawn.mistake)}")
        self.engine = drawn.engine
        if drawn.engine not in self._engines:
            self.folder.tell_engine(drawn.engine, drawn.details)
            self._engines.add(drawn.engine)
        for made in drawn.made:
            self.one(made)
