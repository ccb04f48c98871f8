"""`POST /v1/generate` and `POST /v1/generate/stream`: images, at once or with their progress.

Both draw the same images from the same request. A client that leaves stops the work before the
next step, in both. What may be drawn is said by words of the vocabulary; text of a caller's own is
a right (`free-text`), so that nothing personal and nothing unforeseen gets into a prompt unasked.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from dermaflux.decode import Pixels
from dermaflux.errors import Cancelled, EngineError, RequestError
from dermaflux.flow import MAX_SEED
from dermaflux.images import Form
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import Lesion, caption, parse
from dermaflux.request import Request as Wanted
from serving.access import caller_of
from serving.body import Model, read_json
from serving.drawing import Drawing
from serving.metrics import Metrics
from serving.pictures import Picture, preview, reply, written
from serving.replies import Refusal, error_reply
from serving.schema import (
    GenerateRequest,
    StreamImage,
    StreamPosition,
    StreamProgress,
    StreamRequest,
    StreamStart,
)
from serving.settings import Settings
from serving.stream import STILL_HERE, EventStream, Inbox, event, told
from serving.ticket import News, Position, Step, Ticket

logger = logging.getLogger(__name__)

WRITERS = 2
"""Threads that write files; a large WebP takes half a second, which the drawing need not wait."""


class Generation:
    """The two routes over one pipeline and its queue."""

    def __init__(
        self, pipeline: Pipeline, drawing: Drawing, metrics: Metrics, settings: Settings
    ) -> None:
        self._pipeline = pipeline
        self._drawing = drawing
        self._metrics = metrics
        self._settings = settings
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")

    async def image(self, request: Request) -> Response:
        """One image as a file; several as a zip or as `multipart/mixed`."""
        body = await self.read(request, GenerateRequest)
        pictures = await self.drawn(request, self.wanted(request, body), body.format, body.quality)
        return reply(pictures, request.headers.get("accept", ""))

    async def stream(self, request: Request) -> Response:
        """Server-sent events: `queued`, `position`, `progress`, then `image`s or `error`."""
        body = await self.read(request, StreamRequest)
        wanted = self.wanted(request, body)
        ticket, inbox = self.begun(request, wanted, body.previews)
        return EventStream(self._events(request, body, wanted, ticket, inbox), ticket.stop)

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The checked body."""
        settings = self._settings
        return await read_json(request, model, settings.max_json_bytes, settings.deadline_seconds)

    def wanted(self, request: Request, body: GenerateRequest) -> list[Wanted]:
        """What is to be drawn, one a picture.

        Raises:
            RequestError: a value is out of the bundle's range, or too much for this machine.
            Refusal: 403, the prompt is text of the caller's own and the caller has no right to it.
        """
        if body.n > self._settings.max_images:
            raise RequestError(
                "n", f"{body.n} is out of range; use 1 to {self._settings.max_images}"
            )
        first = self._pipeline.request(
            _prompt(body),
            seed=body.seed,
            steps=body.steps,
            guidance=body.guidance,
            height=body.height,
            width=body.width,
        )
        if body.lesion is None:
            _require_right(request, first.prompt)
        self._fits(first)
        seeds = [(first.seed + number) % (MAX_SEED + 1) for number in range(body.n)]
        return [replace(first, seed=seed) for seed in seeds]

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
        """The finished files in order, or `Cancelled` as soon as the client is gone."""
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
        return [await self._written(one, of, form, quality) for one, of in pairs]

    def close(self) -> None:
        """Writes nothing more."""
        self._writers.shutdown(wait=False, cancel_futures=True)

    async def followed(
        self,
        ticket: Ticket,
        inbox: Inbox,
        wanted: Sequence[Wanted],
        form: Form,
        quality: int | None,
    ) -> AsyncGenerator[News | Picture | None, None]:
        """A ticket's news, then its pictures in order; None in a silence.

        Raises:
            Exception: what the ticket ended with.
        """
        images = asyncio.ensure_future(ticket.images())
        # The thread hands over its last step before its outcome, so this end comes after all steps.
        images.add_done_callback(lambda _: inbox.close())
        try:
            async for news in told(inbox):
                yield news
            for pixels, one in zip(images.result(), wanted, strict=True):
                yield await self._written(pixels, one, form, quality)
        finally:
            images.cancel()

    async def shown(self, pixels: Pixels) -> str:
        """A preview as base64 of a small JPEG."""
        loop = asyncio.get_running_loop()
        return as_base64(await loop.run_in_executor(self._writers, preview, pixels))

    async def _events(
        self,
        request: Request,
        body: GenerateRequest,
        wanted: Sequence[Wanted],
        ticket: Ticket,
        inbox: Inbox,
    ) -> AsyncGenerator[str, None]:
        start = StreamStart(ahead=ticket.ahead, seed=wanted[0].seed, images=len(wanted))
        yield event("queued", start)
        number = itertools.count()
        try:
            all_news = self.followed(ticket, inbox, wanted, body.format, body.quality)
            async with aclosing(all_news):
                async for news in all_news:
                    match news:
                        case None:
                            yield STILL_HERE
                        case Position():
                            yield event("position", StreamPosition(ahead=news.ahead))
                        case Step():
                            seen = None if news.preview is None else await self.shown(news.preview)
                            step = StreamProgress(
                                image=news.item, step=news.step, steps=news.steps, preview=seen
                            )
                            yield event("progress", step)
                        case Picture():
                            yield event("image", self._told(next(number), news))
        except Exception as error:
            # The status has been sent, so failures from here on are told in the stream.
            yield event("error", error_reply(request, error), exclude_none=True)

    def _fits(self, wanted: Wanted) -> None:
        """Refuse at once what would fail when its turn comes."""
        if self._pipeline.plan is None:
            return
        try:
            self._pipeline.plan.batch(wanted.height, wanted.width)
        except EngineError as error:
            # Figures of the machine are for its operator.
            logger.info("refused: %s", error)
            larger = "width" if wanted.width >= wanted.height else "height"
            raise RequestError(
                larger,
                f"an image of {wanted.width} x {wanted.height} pixels does not fit in the memory "
                "of this machine; ask for a smaller one",
            ) from None

    async def _written(
        self, pixels: Pixels, wanted: Wanted, form: Form, quality: int | None
    ) -> Picture:
        record = self._pipeline.record(wanted)
        tokens = self._pipeline.token_count(wanted.prompt)
        write = partial(written, pixels, wanted, record, tokens, form, quality)
        with self._metrics.timed("write"):
            return await asyncio.get_running_loop().run_in_executor(self._writers, write)

    def _told(self, number: int, picture: Picture) -> StreamImage:
        return StreamImage(
            image=number,
            **vars(picture.wanted),
            bundle=picture.record["bundle"],
            engine=picture.record["engine"],
            precision=picture.record["precision"],
            prompt_tokens=picture.prompt_tokens,
            text_length=self._pipeline.model.text_length,
            format=picture.form,
            file=as_base64(picture.data),
        )


def _prompt(body: GenerateRequest) -> str:
    if body.lesion is None:
        assert body.prompt is not None, "the schema wants one of them"
        return body.prompt
    return caption(Lesion.from_mapping(body.lesion.model_dump(exclude_none=True)))


def _require_right(request: Request, prompt: str) -> None:
    """Nothing, where the prompt is a caption or the caller may use free text."""
    if caller_of(request).may("free-text"):
        return
    try:
        parse(prompt)
    except RequestError as error:
        raise Refusal(
            403,
            "forbidden",
            f"{error}. Free text needs the role free-text; without it write such a caption, or "
            "describe the lesion in the field lesion of POST /v1/generate",
            field="prompt",
        ) from None


def as_base64(data: bytes) -> str:
    """Bytes in JSON."""
    return base64.b64encode(data).decode("ascii")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
