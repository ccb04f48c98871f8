"""Heavy work off the event loop: a thread, a bounded queue before it, a deadline, a way to stop.

Generation takes seconds of every core, so one runs at a time and a few may wait; the next is
told to come back later (429) instead of being queued past its deadline. A job whose caller has
left is dropped while it waits and stops at its next step while it runs; its place is free only
when the thread is.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from dermaflux.errors import Cancelled
from serving.replies import Refusal

T = TypeVar("T")

FIRST_GUESS_SECONDS = 5.0
"""How long a job takes before one was measured, for `Retry-After`."""


class Job(Generic[T]):
    """One piece of work in the queue or in the thread."""

    def __init__(self, deadline_seconds: float) -> None:
        self.created = time.monotonic()
        self.started: float | None = None
        self.deadline = self.created + deadline_seconds
        self.deadline_seconds = deadline_seconds
        self._stop = threading.Event()
        self._future: Future[T] | None = None

    def stop(self) -> None:
        """Ask it to end: at once if it still waits, else at its next step. Harmless when done."""
        self._stop.set()
        if self._future is not None:
            self._future.cancel()

    def stopped(self) -> bool:
        """Whether it was asked to end; the work calls this from its thread at every step."""
        return self._stop.is_set()

    async def result(self) -> T:
        """Wait for the outcome; a caller that is cancelled here stops the job.

        Raises:
            Refusal: 504, the deadline passed.
            Exception: whatever the work raised; `Cancelled` after `stop()`.
        """
        assert self._future is not None, "submitted by Worker.submit"
        outcome = asyncio.wrap_future(self._future)
        # A stopped job's outcome is read by nobody; asyncio would log that as a lost exception.
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait({outcome}, timeout=max(0.0, self.deadline - time.monotonic()))
        finally:
            if not outcome.done():
                self.stop()
        if not outcome.done() or outcome.cancelled():
            if time.monotonic() < self.deadline:
                raise Cancelled("stopped before it began")
            raise Refusal(
                504,
                "deadline",
                f"It was not done within {self.deadline_seconds:g} seconds; ask for fewer steps "
                "or a smaller image, or come back when the service is less busy.",
            )
        return outcome.result()


class Worker:
    """`threads` jobs at a time and at most `waiting` behind them."""

    def __init__(self, name: str, *, threads: int, waiting: int, deadline_seconds: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._threads = threads
        self._places = threads + waiting
        self._deadline_seconds = deadline_seconds
        self._jobs: set[Job[object]] = set()
        self._lock = threading.Lock()
        self._usual_seconds = FIRST_GUESS_SECONDS

    @property
    def busy(self) -> int:
        """Jobs in the thread or waiting."""
        return len(self._jobs)

    def submit(self, work: Callable[[Job[T]], T]) -> Job[T]:
        """Queue `work`, which is called in the thread with its job.

        Raises:
            Refusal: 429 with `Retry-After`, no place is free.
        """
        job: Job[T] = Job(self._deadline_seconds)
        with self._lock:
            if len(self._jobs) >= self._places:
                wait = math.ceil(self._usual_seconds * len(self._jobs) / self._threads)
                raise Refusal(
                    429,
                    "busy",
                    f"All {self._places} places are taken; come back in about {wait} seconds.",
                    headers={"Retry-After": str(max(1, wait))},
                )
            self._jobs.add(job)  # type: ignore[arg-type]
        future = self._pool.submit(self._run, job, work)
        job._future = future
        future.add_done_callback(lambda _: self._leave(job))
        return job

    def close(self) -> None:
        """Stop everything and take nothing more."""
        for job in list(self._jobs):
            job.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Job[T], work: Callable[[Job[T]], T]) -> T:
        if job.stopped():
            raise Cancelled("stopped before it began")
        job.started = time.monotonic()
        result = work(job)
        # A moving average, since sizes and steps differ from caller to caller.
        self._usual_seconds += 0.3 * (time.monotonic() - job.started - self._usual_seconds)
        return result

    def _leave(self, job: Job[T]) -> None:
        with self._lock:
            self._jobs.discard(job)
