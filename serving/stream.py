"""Server-sent events that a slow reader cannot make pile up, and a lost one ends.

What the drawing thread tells waits in an `Inbox`, which keeps the newest of a kind alone: a reader
that falls behind misses steps, never the image. A reader that takes nothing for
`SLOW_READER_SECONDS` is given up.

    event: progress
    data: {"image": 0, "step": 3, "steps": 20, "preview": null}
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serving.ticket import News, Position, Step

logger = logging.getLogger(__name__)

STILL_HERE_SECONDS = 10.0
"""A comment goes out in a silence this long, so that no proxy between takes it for a dead line."""
SLOW_READER_SECONDS = 60.0
"""A reader that takes nothing for so long is gone, or means harm."""

STILL_HERE = ": still here\n\n"


class Inbox:
    """News of one ticket that its reader has not taken: the last position, the last step of each
    image, and the images that are done.

    A preview that was not taken yet stays with the step that replaces its own.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._kept: dict[tuple[type[News], int | None], News] = {}
        self._something = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._kept)

    def hand_over(self, news: News) -> None:
        """`put`, for any thread."""
        # The process ends while something was still being drawn: nobody is left to be told.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.put, news)

    def put(self, news: News) -> None:
        """Keep it in place of the last of its kind."""
        kind = type(news), None if isinstance(news, Position) else news.item
        older = self._kept.pop(kind, None)
        if isinstance(news, Step) and isinstance(older, Step) and news.preview is None:
            news = replace(news, preview=older.preview)
        self._kept[kind] = news
        self._something.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._something.set()

    async def take(self) -> News | None:
        """What came first of what is kept; None once it is empty and closed."""
        while not self._kept:
            if self._closed:
                return None
            self._something.clear()
            await self._something.wait()
        return self._kept.pop(next(iter(self._kept)))


class EventStream(StreamingResponse):
    """Server-sent events; `ended` is called with the response's end, however that comes."""

    def __init__(self, events: AsyncGenerator[str, None], ended: Callable[[], None]) -> None:
        # Proxies such as nginx would else hold the events back until the image is there.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SLOW_READER_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            logger.info("a reader of a stream took nothing for %g s", SLOW_READER_SECONDS)
        finally:
            self._ended()


def event(name: str, data: BaseModel, *, exclude_none: bool = False) -> str:
    """One event with JSON in one line."""
    return f"event: {name}\ndata: {data.model_dump_json(exclude_none=exclude_none)}\n\n"


async def told(inbox: Inbox) -> AsyncGenerator[News | None, None]:
    """The news until the inbox is closed; None in a silence, when a comment should go out."""
    while True:
        try:
            async with asyncio.timeout(STILL_HERE_SECONDS):
                news = await inbox.take()
        except TimeoutError:
            yield None
            continue
        if news is None:
            return
        yield news
