"""`POST /v1/generate` and `POST /v1/generate/stream`: images, at once or with their progress.

Both draw the same images from the same request. A client that leaves stops the work before the
next step, in both. What may be drawn is said by words of the vocabulary; text of a caller's own is
a right (`free-text`), so that nothing personal and nothing unforeseen gets into a prompt unasked.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from dermaflux.errors import EngineError, RequestError
from dermaflux.flow import MAX_SEED
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import Lesion, caption, parse
from dermaflux.request import Request as Wanted
from serving.access import caller_of
from serving.body import Model, read_json
from serving.orders import Finished, Orders, as_base64
from serving.pictures import Picture, reply
from serving.records import failed
from serving.replies import Refusal, error_reply, let_go
from serving.settings import Settings
from serving.stream import STILL_HERE, EventStream, Inbox, event
from serving.ticket import Position, Step, Ticket
from serving.wishes import (
    GenerateRequest,
    StreamImage,
    StreamPosition,
    StreamProgress,
    StreamRequest,
    StreamStart,
)

logger = logging.getLogger(__name__)


class Generation:
    """The two routes over one pipeline and the orders of its images."""

    def __init__(self, pipeline: Pipeline, orders: Orders, settings: Settings) -> None:
        self._pipeline = pipeline
        self._orders = orders
        self._settings = settings

    async def image(self, request: Request) -> Response:
        """One image as a file; several as a zip or as `multipart/mixed`."""
        body = await self.read(request, GenerateRequest)
        pictures = await self._orders.drawn(
            request, self.wanted(request, body), body.format, body.quality
        )
        return reply(pictures, request.headers.get("accept", ""))

    async def stream(self, request: Request) -> Response:
        """Server-sent events: `queued`, `position`, `progress`, an `image` when done, `error`."""
        body = await self.read(request, StreamRequest)
        wanted = self.wanted(request, body)
        ticket, inbox = self._orders.begun(request, wanted, body.previews)
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
        try:
            all_news = self._orders.followed(
                request, ticket, inbox, wanted, body.format, body.quality
            )
            async with aclosing(all_news):
                async for news in all_news:
                    match news:
                        case None:
                            yield STILL_HERE
                        case Position():
                            yield event("position", StreamPosition(ahead=news.ahead))
                        case Step():
                            seen = (
                                None
                                if news.preview is None
                                else await self._orders.shown(news.preview)
                            )
                            step = StreamProgress(
                                image=news.item, step=news.step, steps=news.steps, preview=seen
                            )
                            yield event("progress", step)
                        case Finished():
                            yield event("image", self._told(news.item, news.picture))
        except Exception as error:
            # The status has been sent, so failures from here on are told in the stream.
            told = error_reply(request, error)
            let_go(error)
            await failed(request, told.error.code)
            yield event("error", told, exclude_none=True)

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

    def _told(self, number: int, picture: Picture) -> StreamImage:
        return StreamImage(
            image=number,
            **vars(picture.wanted),
            bundle=picture.record["bundle"],
            engine=picture.record["engine"],
            precision=picture.record["precision"],
            tier=picture.record.get("tier"),
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
