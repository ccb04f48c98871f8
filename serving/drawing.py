"""The generator's queue and its one thread: requests join the batch at any step, and leave it.

Generation takes every core or a whole GPU, so one thread draws. Before every step it lets go what
was stopped or is late, and takes in from the queue (`serving.waiting`: callers by turns) what there
is room for; who arrives while others are drawn begins at the next step, not after them. How many
are drawn together is measured by the same thread right after the start (`dermaflux.gains`): as fast
as it goes where nobody waits, one step between two turns where somebody does. It grows with what is
measured, from one; with DERMAFLUX_BATCH = 1 it stays so. Images of several sizes are batches beside
each other which take steps in turn, within the same limit in all. What a request looks like does
not depend on any of this (`dermaflux.underway`).

An engine that fails ends the requests of its batch, and no others. A deadline and a caller who left
do not wait for the thread.

    >>> drawing = Drawing(pipeline, metrics, settings)
    >>> drawing.learn()
    >>> ticket = drawing.submit([request], "ward 3", on_news=print)
    >>> (pixels,) = await ticket.images()
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from dermaflux import gains
from dermaflux.decode import Pixels
from dermaflux.errors import Cancelled
from dermaflux.gains import Gains
from dermaflux.pipeline import Pipeline
from dermaflux.request import Request
from serving.easel import Easel, tell
from serving.metrics import Metrics, Outcome
from serving.pace import Pace
from serving.replies import Refusal
from serving.settings import Settings
from serving.ticket import Done, Item, News, Position, Snapshot, Ticket, items
from serving.waiting import Waiting, taken

logger = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 10.0
"""For which learning what batches gain lets requests go first: an engine may have to prepare for
each batch that it has not seen, and the first callers after a start would wait for that."""


class Drawing:
    """Draws for all callers. Its thread begins with a ticket or `learn`, and ends with `close`."""

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        settings: Settings,
        *,
        limit: int | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._metrics = metrics
        self._settings = settings
        self._forced = limit if limit is not None else settings.batch
        self._limit = self._forced or 1
        self._gains: Gains | None = None
        self._measuring: Iterator[Gains] | None = None
        self._patient_until = 0.0
        self._pace = Pace()
        self._easel = Easel(pipeline, metrics, self.end, self._deliver)
        # Guards all below; notified of whatever the thread or `drained` may wait for.
        self._changed = threading.Condition()
        self._waiting: Waiting[Item] = Waiting()
        self._running: dict[Item, None] = {}
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False

    def submit(
        self,
        wanted: Sequence[Request],
        caller: str,
        *,
        previews: int = 0,
        on_news: Callable[[News], None] | None = None,
    ) -> Ticket:
        """Queue the images of one request of `caller`, at most `previews` small pictures of each.

        `on_news` is called from the thread that draws, and must return at once.

        Raises:
            Refusal: 429 with `Retry-After`, there is no place; 503, the service stops.
            EngineError: an image does not fit in memory.
        """
        assert wanted, "a request is for one image at least"
        for size in {(one.height, one.width) for one in wanted}:
            self._pipeline.batch(*size)
        ticket = Ticket(
            tuple(wanted), caller, self._settings.deadline_seconds, previews, on_news, self
        )
        with self._changed:
            self._refuse(ticket)
            queue = items(ticket)
            for item in queue:
                self._waiting.put(caller, item)
            ticket.ahead = ticket.told = self._ahead()[queue[0]]
            self._changes()
            self._begin()
        return ticket

    def snapshot(self, caller: str | None = None) -> Snapshot:
        """How it stands now; `mine` is of `caller`."""
        usual = self._pipeline.defaults
        with self._changed:
            before = {**dict.fromkeys(self._active(), 0), **self._ahead()}
            return Snapshot(
                waiting=len(self._waiting),
                running=len(self._active()),
                limit=self._limit,
                rates=dict(self._gains.rates) if self._gains else {},
                usual_seconds=self._pace.seconds(usual.height * usual.width * usual.steps),
                backlog_seconds=self._backlog(),
                draining=self._draining,
                mine=tuple(n for item, n in before.items() if item.ticket.caller == caller),
            )

    def learn(self) -> None:
        """Measure what batches gain, and draw that many together; not where the limit is forced.

        Returns at once. Requests that are here go first, for a while (`PATIENCE_SECONDS`). What
        cannot be measured is logged, and what is known by then holds.
        """
        with self._changed:
            if self._forced is None and not self._closed:
                self._measuring = gains.measuring(self._pipeline)
                self._patient_until = time.monotonic() + PATIENCE_SECONDS
                self._begin()
                self._changed.notify_all()

    def drain(self) -> None:
        """Take nothing more; what is here is drawn."""
        with self._changed:
            self._draining = True

    def drained(self, seconds: float) -> bool:
        """Wait until nothing is here any more; False where it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._waiting or self._active()), seconds)

    def close(self) -> None:
        """Take nothing more and end all that is here; the thread ends after its step."""
        with self._changed:
            self._draining = self._closed = True
            tickets = {item.ticket for item in (*self._running, *self._waiting.order())}
            self._changed.notify_all()
        for ticket in tickets:
            self.end(ticket, _stopping())

    def end(self, ticket: Ticket, error: Exception | None) -> None:
        """See `serving.ticket.Desk`."""
        with self._changed:
            if ticket.over:
                return
            for item in [one for one in self._waiting.order() if one.ticket is ticket]:
                self._waiting.discard(ticket.caller, item)
            self._metrics.generation(_outcome(error), len(ticket.wanted))
            ticket.outcome.set_exception(error or Cancelled("it was stopped"))
            self._changes()

    def _refuse(self, ticket: Ticket) -> None:
        """Raise where there is no place for a ticket."""
        if self._draining:
            raise _stopping()
        here = [item.ticket.caller for item in (*self._active(), *self._waiting.order())]
        places = self._limit + self._settings.waiting
        mine = here.count(ticket.caller)
        if not taken(len(ticket.wanted), here=len(here), mine=mine, places=places):
            wait = max(1, math.ceil(self._backlog()))
            raise Refusal(
                429,
                "busy",
                f"{len(here)} of {places} places are taken, {mine} of them by you; come back in "
                f"about {wait} seconds.",
                headers={"Retry-After": str(wait)},
            )

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._draw, name="drawing", daemon=True)
            self._thread.start()
            # A daemon's engine must not be cut off in the middle of a step by the interpreter.
            atexit.register(self._finish)

    def _learn_more(self) -> None:
        """One step of measuring, where it is not over and nobody is to go first."""
        if self._measuring is None:
            return
        with self._changed:
            if (self._running or self._waiting) and time.monotonic() < self._patient_until:
                return
        try:
            found = next(self._measuring, None)
        except Exception:
            # What engines raise, say for memory: fewer together may do, and requests will tell.
            logger.warning("what batches gain was not measured to its end", exc_info=True)
            found = None
        with self._changed:
            if found is not None:
                self._gains, self._limit = found, found.limit()
                self._changes()
                return
            self._measuring, found = None, self._gains
            if found is None:
                return
            if self._limit in found.seconds and len(found.seconds) > 1:
                height, width = found.size
                self._pace.learn(found.seconds[self._limit], self._limit * height * width)
        rates = ", ".join(f"{batch}: {rate:.2f}" for batch, rate in found.rates.items())
        logger.info("draws %d together; steps a second by batch: %s", self._limit, rates)

    def _draw(self) -> None:
        """The thread."""
        try:
            while (admitted := self._admitted()) is not None:
                self._learn_more()
                begin = time.monotonic()
                done = self._easel.turn(admitted)
                with self._changed:
                    if done:
                        self._pace.learn(time.monotonic() - begin, done)
        except Exception:
            # What engines raise never gets here, so this is a mistake of ours. Better to refuse
            # everything than to let it wait for a thread that is gone.
            logger.exception("the thread that draws failed")
            self.close()
        atexit.unregister(self._finish)

    def _finish(self) -> None:
        self.close()
        assert self._thread is not None, "registered with its thread"
        self._thread.join()

    def _admitted(self) -> list[Item] | None:
        """Wait for work; the items that join before the next step; None at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._waiting or self._running or self._measuring
            )
            now = time.monotonic()
            for ticket in {item.ticket for item in (*self._running, *self._waiting.order())}:
                if now >= ticket.deadline:
                    self.end(ticket, ticket.late())
            gone = [item for item in self._running if item.ticket.over]
            for item in gone:
                del self._running[item]
            self._easel.drop(gone)
            if self._closed:
                return None
            admitted = self._admit()
            places = self._ahead()
            self._changes()
        for item, ahead in places.items():
            if item.number == 0 and ahead != item.ticket.told:
                item.ticket.told = ahead
                tell(item.ticket, Position(ahead), self.end)
        return admitted

    def _admit(self) -> list[Item]:
        admitted: list[Item] = []

        def fits(item: Item) -> bool:
            size = item.request.height, item.request.width
            joining = sum((one.request.height, one.request.width) == size for one in admitted)
            return self._easel.room(size) > joining

        while len(self._running) < self._limit and (item := self._waiting.take(fits)) is not None:
            self._running[item] = None
            admitted.append(item)
        return admitted

    def _deliver(self, item: Item, pixels: Pixels) -> None:
        ticket = item.ticket
        # Before the outcome, which is the end of all news.
        tell(ticket, Done(item.number, pixels), self.end)
        with self._changed:
            self._running.pop(item, None)
            ticket.drawn[item.number] = pixels
            if not ticket.over and len(ticket.drawn) == len(ticket.wanted):
                self._metrics.generation("done", len(ticket.wanted))
                ticket.outcome.set_result([ticket.drawn[n] for n in range(len(ticket.wanted))])
            self._changes()

    def _active(self) -> list[Item]:
        """Being drawn, and still wanted."""
        return [item for item in self._running if not item.ticket.over]

    def _ahead(self) -> dict[Item, int]:
        """For every item that waits, the images that have to be done before it begins."""
        free = self._limit - len(self._active())
        return {item: max(0, n - free + 1) for n, item in enumerate(self._waiting.order())}

    def _backlog(self) -> float:
        return self._pace.seconds(
            sum(item.work for item in (*self._active(), *self._waiting.order()))
        )

    def _changes(self) -> None:
        self._metrics.queue(len(self._waiting), len(self._active()))
        self._changed.notify_all()


def _outcome(error: Exception | None) -> Outcome:
    match error:
        case None | Cancelled():
            return "cancelled"
        case Refusal(status=504):
            return "deadline"
        case Refusal():
            return "cancelled"
    return "failed"


def _stopping() -> Refusal:
    return Refusal(503, "not_ready", "The service is stopping; another may take the request.")
