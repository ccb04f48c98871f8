"""A Ray cluster to draw on: reached, joined, and left; or a sentence that says why not.

>>> with connected(settings) as gpus:
...     ...  # ray.data draws there; `gpus` says whether the cluster has any
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import serving
from dermaflux.errors import EngineError
from serving.batch.settings import LOCAL, Settings

_SECONDS: Final = 10.0  # for the head of a cluster to answer at all
_THREADS: Final = ("StreamingExecutor", "iter_threaded")
"""Of Ray Data. Where one asks anything of a cluster that was left, Ray ends the whole process."""
_AUTO: Final = "auto"
"""Ray's own word: the cluster of `RAY_ADDRESS`, else the one that this machine is a node of."""
_EXAMPLE: Final = "10.0.0.1:6379"


def reachable(settings: Settings) -> None:
    """Check, before anything is written, that the cluster of `--ray` can be joined.

    Without `--ray` there is nothing to check.

    Raises:
        EngineError: Ray is not installed, the address is none, or no cluster answers there.
    """
    if settings.ray is None:
        return
    _check(settings)
    if settings.ray != LOCAL:
        with connected(settings):
            pass


@contextmanager
def connected(settings: Settings) -> Iterator[bool]:
    """Joined to the cluster; whether it has GPUs.

    Raises:
        EngineError: see `reachable`.
    """
    _check(settings)
    # Nothing leaves the hospital: Ray would else report its use to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    import ray.data

    # A cluster of one's own has as many slots as engines were asked for, whatever the cores.
    own: dict[str, Any] = {
        "num_cpus": settings.workers * (settings.threads or 1) + 1,
        "include_dashboard": False,
    }
    try:
        with _own_signals():
            ray.init(
                # Without "local" Ray would join a cluster that happens to be on this machine.
                address=settings.ray,
                **(own if settings.ray == LOCAL else {}),
                logging_level=logging.WARNING,
                log_to_driver=False,
                runtime_env={"py_modules": [str(Path(one)) for one in serving.__path__]},
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise _none(settings, error) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield resources.get("GPU", 0) > 0
    finally:
        for thread in threading.enumerate():
            if thread.name.startswith(_THREADS):
                thread.join(_SECONDS)
        ray.shutdown()


def _check(settings: Settings) -> None:
    if importlib.util.find_spec("ray") is None:
        raise EngineError("--ray needs Ray, which is not installed; pip install 'ray[data]'")
    address = str(settings.ray)
    if address == _AUTO:
        address = os.environ.get("RAY_ADDRESS") or _AUTO
    if "://" in address:  # Ray Data does not run over Ray Client
        raise EngineError(
            f"--ray {address}: only the cluster itself can be joined, not its client or job server;"
            f" run this on a machine of the cluster with --ray {_AUTO}, or give the head's own "
            f"address, such as {_EXAMPLE}"
        )
    if address not in (LOCAL, _AUTO):
        try:
            _reach(address)
        except (OSError, ValueError) as error:
            raise _none(settings, error) from error


def _none(settings: Settings, error: Exception) -> EngineError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return EngineError(
        f"no Ray cluster at {settings.ray}: {said[0].rstrip('.')}; give the address of its head, "
        f"such as {_EXAMPLE} (and set RAY_AUTH_MODE=token where it asks for a token), or --ray "
        "alone for a cluster on this machine"
    )


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
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("that is no HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
