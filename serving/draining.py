"""A process that is told to end (SIGTERM) first finishes what it has begun.

uvicorn, which BentoML runs, would close its door at once: a probe of readiness, and a request that
a load balancer sends before it has noticed, would wait in the socket and never be answered. Here
the process first says that it leaves (`begin`), still answers, waits until it is idle, and only
then does what the signal is for. Who sends the signal a second time does not wait.

    >>> work = Work()
    >>> with work: ...                  # around each request
    >>> finish_before_exit(readiness.leave, work.over, seconds=120)
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

logger = logging.getLogger(__name__)


class Work:
    """Counts what is being done, in one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    async def over(self) -> None:
        """Wait until nothing is being done."""
        await self._idle.wait()


def finish_before_exit(
    begin: Callable[[], None], over: Callable[[], Awaitable[None]], seconds: float
) -> None:
    """At the first SIGTERM call `begin`, wait for `over` at most `seconds`, then do what was set
    before. To be called in the event loop; outside of a process's main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    tasks: list[asyncio.Task[None]] = []

    def leave() -> None:
        if tasks and not tasks[0].done():
            tasks[0].cancel()
        elif not tasks:
            begin()
            tasks.append(loop.create_task(finish()))

    async def finish() -> None:
        try:
            async with asyncio.timeout(seconds):
                await over()
            logger.info("all that was begun is finished")
        except TimeoutError:
            logger.warning("something is not finished after %g seconds; it is given up", seconds)
        finally:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    def told(_: int, __: FrameType | None) -> None:
        loop.call_soon_threadsafe(leave)

    signal.signal(signal.SIGTERM, told)
