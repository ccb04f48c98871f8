"""What a request for images holds while it waits and is drawn: its place, its news, its outcome.

>>> ticket = drawing.submit([request], caller="ward 3")
>>> ticket.ahead                    # images that have to be done before it begins
0
>>> (pixels,) = await ticket.images()
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from dermaflux import preview
from dermaflux.decode import Pixels
from dermaflux.request import Request
from serving.replies import Refusal


@dataclass(frozen=True)
class Position:
    """Images that have to be done before the ticket's first one begins; 0: at the next step."""

    ahead: int


@dataclass(frozen=True)
class Step:
    """The ticket's image `item`, from 0, has done `step` of `steps`.

    `preview` is a small picture, uint8 [height, width, 3], where one was due.
    """

    item: int
    step: int
    steps: int
    preview: Pixels | None = None


@dataclass(frozen=True)
class Done:
    """The ticket's image `item` is done: uint8 [height, width, 3]. Comes after its last step."""

    item: int
    pixels: Pixels


News = Position | Step | Done


@dataclass(frozen=True)
class Snapshot:
    """How the generator stands. `mine` is of the caller who was named: for each image of theirs
    that is not done, how many are before it, and 0 where it is being drawn.

    `rates` are steps of one image a second by batch, as measured after the start; empty before, and
    where the limit was forced. `usual_seconds` is what an image of default size and steps takes of
    the engine's time, `backlog_seconds` what all that is here takes.
    """

    waiting: int
    running: int
    limit: int
    rates: dict[int, float]
    usual_seconds: float
    backlog_seconds: float
    draining: bool
    mine: tuple[int, ...] = ()


class Desk(Protocol):
    """Where a ticket ends before its images are done."""

    def end(self, ticket: Ticket, error: Exception | None) -> None:
        """End it with an error, or as stopped; nothing where it has ended already."""
        ...


@dataclass(eq=False)
class Ticket:
    """One request of one caller for one or several images. Made by `Drawing.submit`.

    `ahead` is of the moment when it was taken, `told` what its caller heard last.
    """

    wanted: tuple[Request, ...]
    caller: str
    deadline_seconds: float
    previews: int
    on_news: Callable[[News], None] | None
    desk: Desk
    ahead: int = 0
    created: float = field(default_factory=time.monotonic)
    outcome: Future[list[Pixels]] = field(default_factory=Future)
    drawn: dict[int, Pixels] = field(default_factory=dict)
    told: int = 0

    @property
    def deadline(self) -> float:
        """By the clock of `time.monotonic`."""
        return self.created + self.deadline_seconds

    @property
    def over(self) -> bool:
        """Whether it has its outcome, whichever."""
        return self.outcome.done()

    def stop(self) -> None:
        """Its caller wants it no more: out of the queue at once, and of the batch before the next
        step. Safe from any thread, and harmless when it is over."""
        self.desk.end(self, None)

    def late(self) -> Refusal:
        """What its caller is told at the deadline."""
        return Refusal(
            504,
            "deadline",
            f"It was not done within {self.deadline_seconds:g} seconds; ask for fewer steps "
            "or a smaller image, or come back when the service is less busy.",
        )

    async def images(self) -> list[Pixels]:
        """The images, uint8 [height, width, 3], in the order of the requests.

        A caller that is cancelled here stops the ticket.

        Raises:
            Refusal: 504, the deadline passed; 503, the service was stopped.
            Cancelled: it was stopped.
            EngineError: an engine failed.
        """
        outcome = asyncio.wrap_future(self.outcome)
        # A stopped ticket's outcome is read by nobody; asyncio would log that as a lost exception.
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait({outcome}, timeout=max(0.0, self.deadline - time.monotonic()))
        except asyncio.CancelledError:
            self.stop()
            raise
        if not outcome.done():
            self.desk.end(self, self.late())
        return self.outcome.result()


@dataclass(eq=False)
class Item:
    """One image of a ticket; its own identity is its key in queue and batch."""

    ticket: Ticket
    number: int
    request: Request
    previews_after: frozenset[int]
    done: int = 0

    @property
    def work(self) -> int:
        """What it still takes, in pixels times steps."""
        return self.request.height * self.request.width * (self.request.steps - self.done)


def items(ticket: Ticket) -> list[Item]:
    """One item for each image of a ticket."""
    return [
        Item(ticket, number, request, preview.moments(request.steps, ticket.previews))
        for number, request in enumerate(ticket.wanted)
    ]
