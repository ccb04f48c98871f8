"""The same job on a Ray cluster: actors that hold engines, and one process that writes.

Ray Data spreads blocks of items over a pool of actors, restarts an actor that died and draws its
block again. Finished pictures stream back to the process that asked, which writes them as it
does its own: so no folder need be shared for the results, and the journal has one writer. Every
node has the bundle at the same path (and dermaflux with its extra `batch` and Ray installed).

A block over which its process dies again and again, because a picture exhausts memory, say, is left
out, its items are drawn each alone, and an item that still ends its process has failed.

    python -m serving.batch requests.jsonl --out generated --ray --workers 2        # a cluster here
    python -m serving.batch requests.jsonl --out generated --ray 10.0.0.1:6379 --workers 8
    python -m serving.batch requests.jsonl --out generated --ray auto    # on a machine of a cluster
"""

from __future__ import annotations

import logging
import pickle
import re
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from dermaflux.errors import Cancelled, EngineError
from serving.batch.connection import connected
from serving.batch.job import Folder
from serving.batch.journal import Entry
from serving.batch.maker import Made, Maker, Tools, Try
from serving.batch.settings import Settings
from serving.batch.store import Store
from serving.batch.work import Count, after

log = logging.getLogger(__name__)

_BLOCKS: Final = 5000
"""Blocks at most: each costs the scheduler some milliseconds and a kilobyte for the whole job."""
_DEFAULT_BATCH: Final = 8
_DEATHS: Final = 3
"""Processes that may die over a block: machines that are taken away cost a picture nothing."""
_RESTARTS: Final = 3 * _DEATHS
"""Of an actor, until another takes its place; bounded for one that dies as soon as it starts."""
_ALONE: Final = 32
"""Items that are drawn alone at a time; when so many may be lost, no more blocks are tried."""


@dataclass(frozen=True)
class Drawn:
    """What comes back of a block: its items' tries, or `mistake`, the trace of an error of ours."""

    engine: str
    details: Mapping[str, Any]
    made: Sequence[Sequence[Made]] = ()
    mistake: str = ""


class Actor:
    """A maker in a process of the cluster. Items come and go pickled, in columns of bytes."""

    def __init__(self, tools: Tools, attempts: int, seed: int) -> None:
        self._maker = Maker.open(tools)
        self._attempts = attempts
        self._seed = seed

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        drawn = Drawn(self._maker.engine, self._maker.details)
        try:
            tries = [pickle.loads(data) for data in block["try"]]
            made = exhausted(self._maker, tries, self._attempts, self._seed)
            drawn = replace(drawn, made=made)
        except Exception:
            # Not swallowed but carried to `work_on_ray`, which raises it: Ray would leave the block
            # out without a word, as it shall where a process died.
            drawn = replace(drawn, mistake=traceback.format_exc())
        return {"drawn": np.array([pickle.dumps(drawn)], object)}


def exhausted(maker: Maker, tries: Sequence[Try], attempts: int, seed: int) -> list[list[Made]]:
    """What became of each item, try after try until one is kept, failed, or none is left."""
    outcomes: dict[str, list[Made]] = {one.item.name: [] for one in tries}
    while tries:
        made = maker.develop(tries, maker.denoise(tries))
        for one in made:
            outcomes[one.one.item.name].append(one)
        following = (
            None if one.error or not one.verdict.reasons
            else after("rejected", one.one, attempts, seed)
            for one in made
        )  # fmt: skip
        tries = [one for one in following if one is not None]
    return list(outcomes.values())


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
        EngineError: Ray is not installed, the cluster cannot be reached, no actor can start, or all
            pictures fail.
        Cancelled: the caller asked to stop; all that came back before is written.
        DiskFull: see `Store.write`.
    """
    taken = _Taken(folder, store, cancelled, settled)
    batch = settings.batch or _DEFAULT_BATCH
    with connected(settings) as gpus:
        import ray

        try:
            while left:
                try:
                    taken.all(_blocks(settings, tools, left, gpus, batch, max(1, _ALONE // batch)))
                except ray.exceptions.RayActorError as error:
                    if error.actor_init_failed:
                        raise
                    log.info("processes die again and again: %s", _cause(error))
                left = taken.without(left)
                # What was lost is among the first: blocks are begun in the order of their items.
                alone, left = left[:_ALONE], left[_ALONE:]
                if alone:
                    log.warning(
                        "processes died %d times over some of %d pictures: each of these is drawn "
                        "alone, %s to %s", _DEATHS, len(alone), alone[0].item.name,
                        alone[-1].item.name,
                    )  # fmt: skip
                    taken.all(_blocks(settings, tools, alone, gpus, 1, -1))
                    words = f"its process died {_DEATHS} times, also when it was drawn alone"
                    for one in taken.without(alone):
                        taken.one([Made(one, taken.engine, error=words)])
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"the cluster cannot draw: {_cause(error)}. What came back before is written; "
                "mend that and run the same command again"
            ) from error
    return taken.count


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

    def all(self, blocks: Generator[Mapping[str, Any]]) -> None:
        # Left to themselves, Ray's threads outlive the cluster, and end this process.
        with closing(blocks):
            for block in blocks:
                for data in block["drawn"]:
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
            raise EngineError(f"the cluster cannot draw: {_told(drawn.mistake)}")
        self.engine = drawn.engine
        if drawn.engine not in self._engines:
            self.folder.tell_engine(drawn.engine, drawn.details)
            self._engines.add(drawn.engine)
        for made in drawn.made:
            self.one(made)


def _blocks(
    settings: Settings, tools: Tools, left: Sequence[Try], gpus: bool, batch: int, lost: int
) -> Generator[Mapping[str, Any]]:
    """What comes back of items in blocks; `lost` blocks may not, -1 for any number.

    Raises:
        RayError: more were lost, or no actor can start.
    """
    import ray.data

    ray.data.DataContext.get_current().max_errored_blocks = lost
    blocks = min(-(-len(left) // batch), _BLOCKS)
    tools = replace(tools, bundle=tools.bundle.resolve(), seen=tools.seen and tools.seen.resolve())
    items = ray.data.from_items(
        [{"try": pickle.dumps(one)} for one in left], override_num_blocks=blocks
    )
    with warnings.catch_warnings():
        # Ray means to take these two limits away, and has no others yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        drawn = items.map_batches(
            Actor,
            fn_constructor_args=(tools, settings.attempts, settings.seed),
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(
                size=settings.workers,
                # A block that waits at an actor shares the blame for its death: alone means alone.
                max_tasks_in_flight_per_actor=1 if batch == 1 else None,
            ),
            num_cpus=0 if gpus else settings.threads or 1,
            num_gpus=1 if gpus else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_DEATHS - 1,
        )
    yield from drawn.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)


def _cause(error: BaseException) -> str:
    """What went wrong in an actor, without the traces that Ray puts around it."""
    said = str(error)
    # Ray raises some errors from others that say nothing.
    while error.__cause__ is not None:
        error = error.__cause__
        said = str(error) if str(error).strip() else said
    return _told(said) if said.strip() else type(error).__name__


def _told(trace: str) -> str:
    """The last line of a trace, without the name of its error's class."""
    last = trace.strip().splitlines()[-1].strip()
    return re.sub(r"^[A-Za-z_][\w.]*\.[\w.]*Error: ", "", last)
