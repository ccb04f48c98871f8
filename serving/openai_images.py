"""`POST /v1/images/generations` and `GET /v1/models`: OpenAI's images API, for its clients.

    from openai import OpenAI

    client = OpenAI(base_url="http://localhost:3000/v1", api_key=KEY)
    images = client.images.generate(
        model="mini", prompt="dermoscopic image of a benign lesion, nevus", n=2, size="128x128"
    )

The prompt is a caption in the wording of the model, or free text where the caller may use it. What
the API has and images of lesions have not (styles, quality levels, moderation) is taken and has no
effect; what would promise something that is not done (an address to fetch an image from, a
transparent background) is refused. `seed`, `steps` and `guidance` are ours, by `extra_body`.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dermaflux.errors import RequestError
from dermaflux.request import Request as Wanted
from serving import openai_form
from serving.body import read_json
from serving.card import ModelCard
from serving.generate import Generation
from serving.openai_schema import (
    DEFAULT_FORM,
    CompletedEvent,
    ImagesReply,
    ImagesRequest,
    ModelEntry,
    ModelList,
    OneImage,
    PartialEvent,
    Usage,
    UsageDetails,
)
from serving.orders import Finished, Orders, as_base64
from serving.pictures import Picture
from serving.records import failed
from serving.replies import Refusal, error_reply, let_go, refusal
from serving.settings import Settings
from serving.stream import STILL_HERE, EventStream, Inbox, event
from serving.ticket import Step, Ticket
from serving.wishes import GenerateRequest

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class OpenAIImages:
    """The two routes over what `POST /v1/generate` runs on."""

    def __init__(
        self,
        generation: Generation,
        orders: Orders,
        card: ModelCard,
        settings: Settings,
        pixels_per_token: int,
    ) -> None:
        self._generation = generation
        self._orders = orders
        self._card = card
        self._settings = settings
        self._pixels_per_token = pixels_per_token

    async def images(self, request: Request) -> Response:
        """The images as base64 in JSON; with `stream` as events, with unfinished ones before."""
        settings = self._settings
        body = await read_json(
            request, ImagesRequest, settings.max_json_bytes, settings.deadline_seconds
        )
        wish = self._wish(body)
        wanted = self._wanted(request, wish)
        if body.stream:
            ticket, inbox = self._orders.begun(request, wanted, body.partial_images or 0)
            return EventStream(self._events(request, wish, wanted, ticket, inbox), ticket.stop)
        pictures = await self._orders.drawn(request, wanted, wish.format, wish.quality)
        reply = ImagesReply(
            created=int(time.time()),
            output_format=wish.format,
            size=_size(wanted[0]),
            data=[OneImage(b64_json=as_base64(one.data), seed=one.wanted.seed) for one in pictures],
            usage=self._usage(pictures),
        )
        return JSONResponse(reply.model_dump(), headers={"Cache-Control": "no-store"})

    async def models(self, _: Request) -> Response:
        """What is served here, as the one model of the list."""
        card = self._card
        created = int(datetime.fromisoformat(card.created).timestamp())
        entry = ModelEntry(id=card.name, created=created, owned_by=card.made_by)
        return JSONResponse(ModelList(data=[entry]).model_dump())

    def _wish(self, body: ImagesRequest) -> GenerateRequest:
        """The same in our words."""
        card = self._card
        if body.model is not None and body.model not in (card.name, card.bundle):
            raise Refusal(
                404, "not_found", f"model: is not served here; use {card.name}", field="model"
            )
        width = height = None
        if body.size not in (None, "auto"):
            found = SIZE.fullmatch(body.size)
            if found is None:
                raise RequestError("size", "needs the form WIDTHxHEIGHT, such as 128x128, or auto")
            width, height = int(found[1]), int(found[2])
        form = body.output_format or DEFAULT_FORM
        return GenerateRequest(
            prompt=body.prompt,
            seed=body.seed,
            steps=body.steps,
            guidance=body.guidance,
            width=width,
            height=height,
            n=body.n or 1,
            format=form,
            quality=_quality(form, body.output_compression),
        )

    def _wanted(self, request: Request, wish: GenerateRequest) -> list[Wanted]:
        try:
            return self._generation.wanted(request, wish)
        except RequestError as error:
            if error.field in ("width", "height"):
                raise Refusal(422, "invalid_request", f"size: {error}", field="size") from None
            raise

    async def _events(
        self,
        request: Request,
        wish: GenerateRequest,
        wanted: Sequence[Wanted],
        ticket: Ticket,
        inbox: Inbox,
    ) -> AsyncGenerator[str, None]:
        number = itertools.count()
        common: dict[str, Any] = {"created_at": int(time.time()), "size": _size(wanted[0])}
        try:
            all_news = self._orders.followed(
                request, ticket, inbox, wanted, wish.format, wish.quality
            )
            async with aclosing(all_news):
                async for news in all_news:
                    match news:
                        case None:
                            yield STILL_HERE
                        case Step(preview=seen) if seen is not None:
                            partial = PartialEvent(
                                b64_json=await self._orders.shown(seen),
                                partial_image_index=next(number),
                                **common,
                            )
                            yield event(partial.type, partial)
                        case Finished(picture=picture):
                            done = CompletedEvent(
                                b64_json=as_base64(picture.data),
                                output_format=picture.form,
                                seed=picture.wanted.seed,
                                usage=self._usage([picture]),
                                **common,
                            )
                            yield event(done.type, done)
        except Exception as error:
            # The status has been sent, so failures from here on are told in the stream.
            told = error_reply(request, error).error
            await failed(request, told.code)
            status = refusal(error).status
            let_go(error)
            _, form = openai_form.error_form(status, told.code, told.message, told.field)
            yield f"event: error\ndata: {json.dumps(form)}\n\n"

    def _usage(self, pictures: Sequence[Picture]) -> Usage:
        """Tokens of the prompts and of the images, as the transformer sees them."""
        read = sum(min(one.prompt_tokens, self._card.text_length) for one in pictures)
        pixels = sum(one.wanted.height * one.wanted.width for one in pictures)
        made = pixels // self._pixels_per_token
        return Usage(
            input_tokens=read,
            input_tokens_details=UsageDetails(text_tokens=read),
            output_tokens=made,
            total_tokens=read + made,
        )


def _quality(form: str, compression: int | None) -> int | None:
    """`output_compression`, 0 to 100, means quality, and 100 the best that the format has."""
    if compression is None or form == "png":
        return None if form != "jpeg" else 100
    if compression == 100 and form == "webp":
        return None
    return max(1, compression)


def _size(wanted: Wanted) -> str:
    return f"{wanted.width}x{wanted.height}"
