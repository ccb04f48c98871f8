"""Ray's own process: joins a cluster, draws what it is asked to, and sends back what comes of it.

Begun by `serving.batch.connection` with a socket of which this process has the other end; what is
said over it is written there. It holds nothing that is lost when it dies: the process that began it
writes, and asks again for what did not come back.

    python -m serving.batch.driver 5        # 5: the socket's number
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import serving
from serving.batch.actor import DEATHS, Actor
from serving.batch.connection import Blocks, Failure, told
from serving.batch.settings import LOCAL, Settings

_BLOCKS: Final = 5000
"""Blocks at most: each costs the scheduler some milliseconds and a kilobyte for the whole job."""
_RESTARTS: Final = 3 * DEATHS
"""Of an actor, until another takes its place; bounded for one that dies as soon as it starts."""

_CLOSED: Final = signal.SIGUSR1
"""Interrupts the main thread of this process, from within."""
_THREADS: Final = ("StreamingExecutor", "iter_threaded")  # of Ray Data
_SECONDS: Final = 10.0  # for each of them to end
_LEAVING: Final = 30.0  # for all

Asked = tuple[Blocks, list[bytes]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until the other end is closed. Never returns."""
    number = int((sys.argv[1:] if arguments is None else arguments)[0])
    # Who inherits the socket keeps it open after this process, and the other end waits.
    os.set_inheritable(number, False)
    # The last line on stdout is the command's.
    os.dup2(2, 1)
    _leave_signals_alone()
    signal.signal(_CLOSED, signal.default_int_handler)
    ends = Connection(number)
    status = 1
    try:
        with suppress(KeyboardInterrupt, EOFError):
            _serve(ends)
        signal.signal(_CLOSED, signal.SIG_IGN)
        _leave()
        status = 0
    finally:
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        # Not by Python's own end, over which Ray's threads may stumble: all is said.
        os._exit(status)


def _serve(ends: Connection) -> None:
    """Answer what is asked.

    Raises:
        KeyboardInterrupt: the other end is closed.
    """
    settings = ends.recv()
    asked: SimpleQueue[Asked] = SimpleQueue()
    threading.Thread(target=_listen, args=(ends, asked), daemon=True).start()
    try:
        gpus = _joined(settings)
    except Exception as error:
        # Not swallowed but carried. Ray raises errors of any class here, `Exception` itself too.
        _say(ends, Failure(str(error).strip() or type(error).__name__))
        return
    _say(ends, None)
    while True:
        _say(ends, _drawn(ends, settings, gpus, *asked.get()))


def _leave() -> None:
    """Leave the cluster, and end one that began here: processes that a killed one has only just
    started look for it for half a minute."""
    if (ray := sys.modules.get("ray")) is None:
        return
    # Where one of them asks anything of a cluster that was left, Ray ends the whole process.
    for thread in threading.enumerate():
        if thread.name.startswith(_THREADS):
            thread.join(_SECONDS)
    ray.shutdown()


def _leave_signals_alone() -> None:
    """They are for the process at the other end, which ends this one: schedulers send them to all.
    A handler rather than `SIG_IGN`, which the processes that Ray starts would inherit."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)


def _say(ends: Connection, words: bytes | Failure | None) -> None:
    try:
        ends.send(words)
    except OSError:
        time.sleep(_LEAVING)  # nobody listens any more: `_listen` interrupts


def _listen(ends: Connection, asked: SimpleQueue[Asked]) -> None:
    """Put what is asked into the queue, and interrupt the main thread when the other end is closed:
    all is done, or no more is wanted, or who began this was killed."""
    tries: list[bytes] = []
    try:
        while True:
            words = ends.recv()
            if isinstance(words, Blocks):
                asked.put((words, tries))
                tries = []
            else:
                tries += words
    except (EOFError, OSError):
        pass
    except Exception:
        # What cannot be unpickled, say. Else nobody would hear of it, and both ends wait for ever.
        traceback.print_exc()
    signal.pthread_kill(threading.main_thread().ident or 0, _CLOSED)
    time.sleep(_LEAVING)
    # The cluster that began here is killed by the system, whose child it is; one that was joined
    # ends what it has of ours when it misses us.
    os._exit(1)


def _joined(settings: Settings) -> bool:
    """Join the cluster; whether it has GPUs."""
    # Nothing leaves the hospital: Ray would else report its use to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    import ray.data

    # A cluster of one's own has as many slots as engines were asked for, whatever the cores.
    own: dict[str, Any] = {
        "num_cpus": settings.workers * (settings.threads or 1) + 1,
        "include_dashboard": False,
    }
    ray.init(
        # Without "local" Ray would join a cluster that happens to be on this machine.
        address=settings.ray,
        **(own if settings.ray == LOCAL else {}),
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"py_modules": [str(Path(one)) for one in serving.__path__]},
    )
    _leave_signals_alone()  # Ray has taken SIGTERM for itself
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0) > 0


def _drawn(
    ends: Connection, settings: Settings, gpus: bool, blocks: Blocks, tries: list[bytes]
) -> Failure | None:
    """Send back what comes of the blocks; why there is not more, or None."""
    import ray

    try:
        for block in _pass(settings, gpus, blocks, tries):
            for data in block["drawn"]:
                _say(ends, bytes(data))
    except ray.exceptions.RayActorError as error:
        return Failure(_cause(error), deaths=not error.actor_init_failed)
    except ray.exceptions.RayError as error:
        return Failure(_cause(error))
    except Exception as error:
        # Not swallowed but carried to the command, which tells of it.
        return Failure(_cause(error), trace=traceback.format_exc())
    return None


def _pass(
    settings: Settings, gpus: bool, blocks: Blocks, tries: list[bytes]
) -> Iterator[Mapping[str, Any]]:
    import ray.data

    ray.data.DataContext.get_current().max_errored_blocks = blocks.lost
    tools = blocks.tools
    tools = replace(tools, bundle=tools.bundle.resolve(), seen=tools.seen and tools.seen.resolve())
    count = min(-(-len(tries) // blocks.batch), _BLOCKS)
    items = ray.data.from_items([{"try": one} for one in tries], override_num_blocks=count)
    with warnings.catch_warnings():
        # Ray means to take these two limits away, and has no others yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        drawn = items.map_batches(
            Actor,
            fn_constructor_args=(tools, settings.attempts, settings.seed),
            batch_size=blocks.batch,
            compute=ray.data.ActorPoolStrategy(
                size=settings.workers,
                # A block that waits at an actor shares the blame for its death: alone means alone.
                max_tasks_in_flight_per_actor=1 if blocks.batch == 1 else None,
            ),
            num_cpus=0 if gpus else settings.threads or 1,
            num_gpus=1 if gpus else 0,
            max_restarts=_RESTARTS,
            max_task_retries=DEATHS - 1,
        )
    yield from drawn.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)


def _cause(error: BaseException) -> str:
    """What went wrong in an actor, without the traces that Ray puts around it."""
    said = str(error)
    # Ray raises some errors from others that say nothing.
    while error.__cause__ is not None:
        error = error.__cause__
        said = str(error) if str(error).strip() else said
    return told(said) if said.strip() else type(error).__name__


if __name__ == "__main__":
    main()
