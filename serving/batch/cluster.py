"""The same job on a Ray cluster: actors that hold engines, and one process that writes.

Ray Data spreads blocks of items over a pool of actors, restarts an actor that died and gives its
blocks to others. Finished pictures stream back to the process that asked, which writes them as it
does its own: so no folder need be shared for the results, and the journal has one writer. Every
node has the bundle at the same path (and dermaflux with its extra `batch` and Ray installed).

    python -m serving.batch requests.jsonl --out generated --ray --workers 2        # a cluster here
    python -m serving.batch requests.jsonl --out generated --ray 10.0.0.1:6379 --workers 8
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

import serving
from dermaflux.errors import Cancelled, EngineError
from serving.batch.job import Folder
from serving.batch.journal import Entry
from serving.batch.maker import Made, Maker, Tools, Try
from serving.batch.settings import LOCAL, Settings
from serving.batch.store import Store
from serving.batch.work import Count, after

log = logging.getLogger(__name__)

_BLOCKS: Final = 5000
"""Blocks at most: each costs the scheduler some milliseconds and a kilobyte for the whole job."""
_DEFAULT_BATCH: Final = 8
_SECONDS: Final = 10.0  # for the head of a cluster to answer at all


class Actor:
    """A maker in a process of the cluster. Items come and go pickled, in columns of bytes."""

    def __init__(self, tools: Tools, attempts: int, seed: int) -> None:
        self._maker = Maker.open(tools)
        self._attempts = attempts
        self._seed = seed

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        tries = [pickle.loads(data) for data in block["try"]]
        made = pickle.dumps(exhausted(self._maker, tries, self._attempts, self._seed))
        about = pickle.dumps((self._maker.engine, self._maker.details))
        return {"made": np.array([made], object), "engine": np.array([about], object)}


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
        EngineError: Ray is not installed, the cluster cannot be reached, or no actor can start.
        Cancelled: the caller asked to stop; all that came back before is written.
        DiskFull: see `Store.write`.
    """
    count = Count()
    known: set[str] = set()
    with _cluster(settings) as gpus:
        import ray

        try:
            for block in _blocks(settings, tools, left, gpus):
                engine, details = pickle.loads(block["engine"][0])
                if engine not in known:
                    folder.tell_engine(engine, details)
                    known.add(engine)
                for made in pickle.loads(block["made"][0]):
                    entries = store.write(made)
                    for entry in entries:
                        count.add(entry)
                    settled(entries[-1])
                if cancelled():
                    raise Cancelled("stopped")
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"the cluster cannot draw: {_cause(error)}. What came back before is written; "
                "mend that and run the same command again"
            ) from error
    return count


def _blocks(
    settings: Settings, tools: Tools, left: Sequence[Try], gpus: bool
) -> Iterator[Mapping[str, Any]]:
    import ray.data

    batch = settings.batch or _DEFAULT_BATCH
    blocks = min(-(-len(left) // batch), _BLOCKS)
    tools = replace(tools, bundle=tools.bundle.resolve(), seen=tools.seen and tools.seen.resolve())
    items = ray.data.from_items(
        [{"try": pickle.dumps(one)} for one in left], override_num_blocks=blocks
    )
    made = items.map_batches(
        Actor,
        fn_constructor_args=(tools, settings.attempts, settings.seed),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=settings.workers),
        num_cpus=0 if gpus else settings.threads or 1,
        num_gpus=1 if gpus else 0,
    )
    return iter(made.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))


@contextmanager
def _cluster(settings: Settings) -> Iterator[bool]:
    """Connected to a cluster; whether it has GPUs."""
    if importlib.util.find_spec("ray") is None:
        raise EngineError("--ray needs Ray, which is not installed; pip install 'ray[data]'")
    # Nothing leaves the hospital: Ray would else report its use to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    import ray.data

    here = settings.ray == LOCAL
    # A cluster of one's own has as many slots as engines were asked for, whatever the cores.
    own: dict[str, Any] = {
        "num_cpus": settings.workers * (settings.threads or 1) + 1,
        "include_dashboard": False,
    }
    try:
        with _own_signals():
            if not here:
                _reach(str(settings.ray))
            ray.init(
                **(own if here else {"address": settings.ray}),
                logging_level=logging.WARNING,
                log_to_driver=False,
                runtime_env={"py_modules": [str(Path(one)) for one in serving.__path__]},
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster at {settings.ray}: {error}; give the address of its head, such as "
            "10.0.0.1:6379, or --ray alone for a cluster on this machine"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield resources.get("GPU", 0) > 0
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end this process in the midst of a batch."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _reach(address: str) -> None:
    """Ray itself tries for many minutes, and says nothing.

    Raises:
        OSError: nobody answers there.
        ValueError: it is no address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("that is no HOST:PORT")
    socket.create_connection((host, int(port)), timeout=_SECONDS).close()


def _cause(error: BaseException) -> str:
    """What went wrong in an actor, without the traces that Ray puts around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
