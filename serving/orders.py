"""A request's images on their way: a ticket of the queue, its news, and files at the end.

Files are written by a few threads of their own: the one that draws goes on meanwhile, and so does
the event loop.

    >>> pictures = await orders.drawn(request, wanted, "webp", None)
    >>> ticket, inbox = orders.begun(request, wanted, previews=4)
    >>> async for news in orders.followed(request, ticket, inbox, wanted, "png", None): ...
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from dermaflux.decode import Pixels
from dermaflux.errors import Cancelled
from dermaflux.images import Form
from dermaflux.pipeline import Pipeline
from dermaflux.request import Request as Wanted
from serving.access import caller_of
from serving.drawing import Drawing
from serving.marking import Marking
from serving.metrics import Metrics
from serving.pictures import Picture, preview
from serving.records import note, record
from serving.stream import Inbox, told
from serving.ticket import Done, Position, Step, Ticket

WRITERS = 2
"""Threads that write files; a large WebP takes half a second, which the drawing need not wait."""


@dataclass(frozen=True)
class Finished:
    """The ticket's image `item`, from 0, as a file."""

    item: int
    picture: Picture


class Orders:
    """What the routes of generation have in common, over one pipeline and its queue."""

    def __init__(
        self, pipeline: Pipeline, drawing: Drawing, metrics: Metrics, marking: Marking
    ) -> None:
        self._pipeline = pipeline
        self._marking = marking
        self._drawing = drawing
        self._metrics = metrics
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")

    def begun(
        self, request: Request, wanted: Sequence[Wanted], previews: int
    ) -> tuple[Ticket, Inbox]:
        """A ticket whose news will be followed."""
        inbox = Inbox()
        caller = caller_of(request).lane
        return self._drawing.submit(
            wanted, caller, previews=previews, on_news=inbox.hand_over
        ), inbox

    async def drawn(
        self, request: Request, wanted: Sequence[Wanted], form: Form, quality: int | None
    ) -> list[Picture]:
        """The finished files in order, whose pixels the request's record will name, or `Cancelled`
        as soon as the client is gone."""
        ticket = self._drawing.submit(wanted, caller_of(request).lane)
        gone = asyncio.ensure_future(_gone(request))
        images = asyncio.ensure_future(ticket.images())
        try:
            await asyncio.wait({gone, images}, return_when=asyncio.FIRST_COMPLETED)
            if not images.done():
                raise Cancelled("the client has left")
            pixels = images.result()
        finally:
            ticket.stop()
            gone.cancel()
            images.cancel()
        pairs = zip(pixels, wanted, strict=True)
        pictures = [await self._written(one, of, form, quality) for one, of in pairs]
        await note(request, [one.pixels_sha256 for one in pictures])
        return pictures

    def close(self) -> None:
        """Writes nothing more."""
        self._writers.shutdown(wait=False, cancel_futures=True)

    async def followed(
        self,
        request: Request,
        ticket: Ticket,
        inbox: Inbox,
        wanted: Sequence[Wanted],
        form: Form,
        quality: int | None,
    ) -> AsyncGenerator[Position | Step | Finished | None, None]:
        """A ticket's news, each picture as soon as it is done and recorded; None in a silence.

        Raises:
            Refusal: 503, a picture can be neither recorded nor shown.
            Exception: what the ticket ended with.
        """
        images = asyncio.ensure_future(ticket.images())
        # The thread hands over its last step before its outcome, so this end comes after all steps.
        images.add_done_callback(lambda _: inbox.close())
        try:
            async for news in told(inbox):
                if isinstance(news, Done):
                    one = wanted[news.item]
                    picture = await self._written(news.pixels, one, form, quality)
                    await record(request, [picture.pixels_sha256])
                    yield Finished(news.item, picture)
                else:
                    yield news
            # All that was done has gone out; why the rest was not is told now.
            images.result()
        finally:
            images.cancel()

    async def shown(self, pixels: Pixels) -> str:
        """A preview as base64 of a small JPEG."""
        loop = asyncio.get_running_loop()
        return as_base64(await loop.run_in_executor(self._writers, preview, pixels))

    async def _written(
        self, pixels: Pixels, wanted: Wanted, form: Form, quality: int | None
    ) -> Picture:
        made_of = self._pipeline.record(wanted)
        tokens = self._pipeline.token_count(wanted.prompt)
        write = partial(self._marking.written, pixels, wanted, made_of, tokens, form, quality)
        with self._metrics.timed("write"):
            return await asyncio.get_running_loop().run_in_executor(self._writers, write)


def as_base64(data: bytes) -> str:
    """Bytes in JSON."""
    return base64.b64encode(data).decode("ascii")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
