"""One turn of the generator: what was stopped goes, what is new joins, all make a step, some leave.

Runs in the thread that draws, and knows neither queue nor lock: it is given items, and hands each
over as pixels or ends its ticket with an error. Whatever an engine raises ends the tickets of its
batch, and the next turn is like any other. One image that cannot be decoded does not take along
those that were finished with it: they are decoded apart then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

from dermaflux.decode import Pixels
from dermaflux.flow import Floats
from dermaflux.pipeline import Pipeline
from dermaflux.underway import Size, Underway
from serving.metrics import Metrics
from serving.ticket import Item, News, Step, Ticket

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Easel:
    """Images being drawn. `end` ends a ticket with an error, `deliver` takes an item's pixels."""

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        end: Callable[[Ticket, Exception], None],
        deliver: Callable[[Item, Pixels], None],
    ) -> None:
        self._underway: Underway[Item] = Underway(pipeline)
        self._metrics = metrics
        self._end = end
        self._deliver = deliver

    def room(self, size: Size) -> int:
        """How many more images of a size there is room for."""
        return self._underway.room(size)

    def drop(self, items: Collection[Item]) -> None:
        """Let items go."""
        self._underway.drop(items)

    def turn(self, admitted: Sequence[Item]) -> int:
        """Take items in, and give every batch a step: the work done, in pixels times steps."""
        if admitted:
            for item in admitted:
                self._metrics.took("wait", time.monotonic() - item.ticket.created)
            with self._metrics.timed("encode"):
                wanted = {item: item.request for item in admitted}
                self._attempt(admitted, lambda: self._underway.join(wanted))
        work = sum(self._step(size) for size in self._underway.sizes)
        finished = self._underway.finished()
        # One size after the other, so that a size whose decoder fails fails alone.
        for size in dict.fromkeys((i.request.height, i.request.width) for i in finished):
            self._develop({i: x for i, x in finished.items() if _size(i) == size})
        return work

    def _step(self, size: Size) -> int:
        # Asked before every step, not once a turn: the step of another size may have been long.
        self.drop([item for item in self._underway.of(size) if item.ticket.over])
        items = self._underway.of(size)
        if not items:
            return 0
        self._metrics.batch(len(items))
        begin = time.monotonic()
        moved = self._attempt(items, lambda: self._underway.step(size))
        if moved is not None:
            computed = self._underway.computed
            self._metrics.step(time.monotonic() - begin, computed, len(moved) - computed)
        for item, done in (moved or {}).items():
            item.done = done
        self._tell(list(moved or ()))
        return len(items) * size[0] * size[1]

    def _tell(self, moved: Sequence[Item]) -> None:
        due = [i for i in moved if i.done in i.previews_after and not i.ticket.over]
        shown = self._previews(due) if due else {}
        for item in moved:
            news = Step(item.number, item.done, item.request.steps, shown.get(item))
            tell(item.ticket, news, self._end)

    def _previews(self, due: Sequence[Item]) -> Mapping[Item, Pixels]:
        try:
            return self._underway.previews(due)
        except Exception:
            # The images themselves are well.
            logger.warning("previews failed", exc_info=True)
            return {}

    def _develop(self, latents: Mapping[Item, Floats]) -> None:
        with self._metrics.timed("decode"):
            try:
                images = self._underway.develop(latents)
            except Exception as error:
                if len(latents) == 1:
                    self._failed(latents, error)
                    return
                images = {}
        if not images:
            for item in latents:
                self._develop({item: latents[item]})
        for item, pixels in images.items():
            self._deliver(item, pixels)

    def _attempt(self, items: Collection[Item], work: Callable[[], T]) -> T | None:
        """What `work` gives; where it raises, the tickets of `items` end with that, as with an
        executor: it is for who waits, not for this thread, which has others to serve."""
        try:
            return work()
        except Exception as error:
            self._failed(items, error)
            return None

    def _failed(self, items: Collection[Item], error: Exception) -> None:
        """End their tickets; whoever calls `turn` drops what has ended before the next one."""
        for item in items:
            self._end(item.ticket, error)


def tell(ticket: Ticket, news: News, end: Callable[[Ticket, Exception], None]) -> None:
    """Give a ticket its news; one whose listener fails is ended with that."""
    if ticket.on_news is None or ticket.over:
        return
    try:
        ticket.on_news(news)
    except Exception as error:
        end(ticket, error)


def _size(item: Item) -> Size:
    return item.request.height, item.request.width
