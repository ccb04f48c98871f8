"""Stands in for the generator's queue until that is there: one ticket at a time, in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dermaflux.decode import Pixels
from dermaflux.errors import Cancelled
from dermaflux.pipeline import Pipeline, Progress
from dermaflux.request import Request as Wanted
from serving.metrics import Metrics
from serving.replies import Refusal
from serving.worker import Job, Worker


@dataclass(frozen=True)
class Position:
    """How many images are before this ticket's first."""

    ahead: int


@dataclass(frozen=True)
class Step:
    """Image `item` of the ticket has done `step` of `steps`."""

    item: int
    step: int
    steps: int
    preview: Pixels | None = None


News = Position | Step


class Ticket:
    """One HTTP request's images."""

    def __init__(self, job: Job[list[Pixels]], ahead: int, metrics: Metrics) -> None:
        self.ahead = ahead
        self._job = job
        self._metrics = metrics

    def stop(self) -> None:
        """Ends it before its next step."""
        self._job.stop()

    async def images(self) -> list[Pixels]:
        """The images in order."""
        import asyncio

        try:
            drawn = await self._job.result()
        except (Cancelled, asyncio.CancelledError):
            self._metrics.generation("cancelled")
            raise
        except Refusal:
            self._metrics.generation("deadline")
            raise
        except Exception:
            self._metrics.generation("failed")
            raise
        self._metrics.generation("done")
        return drawn


class Drawing:
    """Submits tickets to the worker."""

    def __init__(self, pipeline: Pipeline, worker: Worker, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._worker = worker
        self._metrics = metrics

    def submit(
        self,
        wanted: Sequence[Wanted],
        caller: str,
        *,
        previews: int = 0,
        on_news: Callable[[News], None] | None = None,
    ) -> Ticket:
        """Takes a request in."""
        ahead = self._worker.busy

        def draw(job: Job[list[Pixels]]) -> list[Pixels]:
            self._metrics.took("wait", time.monotonic() - job.created)

            def on_step(progress: Progress) -> None:
                for item in progress.items:
                    if on_news is not None:
                        on_news(Step(item, progress.step, wanted[item].steps))

            with self._metrics.timed("generate"):
                return self._pipeline.generate(wanted, on_step=on_step, cancelled=job.stopped)

        return Ticket(self._worker.submit(draw), ahead, self._metrics)
