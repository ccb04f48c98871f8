"""`POST /v1/generate` and `POST /v1/generate/stream`: one image, at once or with its progress.

Both draw the same image from the same request. A client that leaves stops the work at the next
step, in both. Reproduction data that is ASCII by nature goes into headers; the prompt, which may
be any language, only into the PNG's text and the stream's JSON.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dermaflux.errors import Cancelled, EngineError, RequestError
from dermaflux.images import encode_png
from dermaflux.pipeline import Pipeline, Progress
from dermaflux.pipeline import Request as Wanted
from dermaflux.prompt import Lesion, caption
from serving.body import read_generate_request
from serving.metrics import Metrics
from serving.replies import Refusal, error_reply
from serving.schema import (
    GenerateRequest,
    StreamImage,
    StreamProgress,
    StreamStart,
)
from serving.settings import Settings
from serving.worker import Job, Worker

logger = logging.getLogger(__name__)

STILL_HERE_SECONDS = 10.0
"""A comment goes out in a silence this long, so that no proxy between takes it for a dead line."""

REPRODUCTION = ("bundle", "seed", "steps", "guidance", "engine", "precision")
"""Parts of an image's record that are ASCII whatever was asked, so they can be headers."""


@dataclass(frozen=True)
class Drawn:
    """A finished image as a PNG file, with what is needed to draw it again."""

    wanted: Wanted
    prompt_tokens: int
    png: bytes


class Generation:
    """The two routes over one pipeline."""

    def __init__(
        self, pipeline: Pipeline, worker: Worker, metrics: Metrics, settings: Settings
    ) -> None:
        self._pipeline = pipeline
        self._worker = worker
        self._metrics = metrics
        self._settings = settings

    async def image(self, request: Request) -> Response:
        """The image as `image/png`."""
        wanted = await self._wanted(request)
        job = self._worker.submit(lambda job: self._draw(wanted, job, None))
        drawn = await self._outcome(request, job)
        return Response(drawn.png, media_type="image/png", headers=self._headers(drawn))

    async def stream(self, request: Request) -> Response:
        """Server-sent events: `queued`, `progress` per step, then `image` or `error`."""
        wanted = await self._wanted(request)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[StreamProgress | None] = asyncio.Queue()

        def on_step(progress: Progress) -> None:
            step = StreamProgress(step=progress.step, steps=progress.steps)
            loop.call_soon_threadsafe(news.put_nowait, step)

        ahead = self._worker.busy
        job = self._worker.submit(lambda job: self._draw(wanted, job, on_step))
        start = StreamStart(ahead=ahead, seed=wanted.seed)
        return _EventStream(self._events(request, start, job, news), job)

    async def _events(
        self,
        request: Request,
        start: StreamStart,
        job: Job[Drawn],
        news: asyncio.Queue[StreamProgress | None],
    ) -> AsyncGenerator[str, None]:
        outcome = asyncio.ensure_future(self._settled(job))
        # The thread hands over its last step before its outcome, so this end comes after all steps.
        outcome.add_done_callback(lambda _: news.put_nowait(None))
        try:
            yield _event("queued", start)
            while True:
                try:
                    async with asyncio.timeout(STILL_HERE_SECONDS):
                        step = await news.get()
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if step is None:
                    break
                yield _event("progress", step)
            yield _event("image", self._told(outcome.result()))
        except Exception as error:
            # The status has been sent, so failures from here on are told in the stream.
            yield _event("error", error_reply(request, error), exclude_none=True)
        finally:
            outcome.cancel()

    async def _wanted(self, request: Request) -> Wanted:
        body = await read_generate_request(
            request, self._settings.max_json_bytes, self._settings.deadline_seconds
        )
        wanted = self._pipeline.request(
            _prompt(body),
            seed=body.seed,
            steps=body.steps,
            guidance=body.guidance,
            height=body.height,
            width=body.width,
        )
        self._fits(wanted)
        return wanted

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

    def _draw(
        self, wanted: Wanted, job: Job[Drawn], on_step: Callable[[Progress], None] | None
    ) -> Drawn:
        """The work itself; runs in the worker's thread."""
        self._metrics.took("wait", time.monotonic() - job.created)
        with self._metrics.timed("generate"):
            (pixels,) = self._pipeline.generate([wanted], on_step=on_step, cancelled=job.stopped)
        with self._metrics.timed("write_png"):
            png = encode_png(pixels, self._pipeline.record(wanted))
        return Drawn(wanted, self._pipeline.token_count(wanted.prompt), png)

    async def _outcome(self, request: Request, job: Job[Drawn]) -> Drawn:
        """The job's result, or `Cancelled` as soon as the client is gone."""
        gone = asyncio.ensure_future(_gone(request))
        outcome = asyncio.ensure_future(self._settled(job))
        try:
            await asyncio.wait({gone, outcome}, return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                raise Cancelled("the client has left")
            return outcome.result()
        finally:
            gone.cancel()
            outcome.cancel()

    async def _settled(self, job: Job[Drawn]) -> Drawn:
        """The job's result, counted by its outcome."""
        try:
            drawn = await job.result()
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

    def _headers(self, drawn: Drawn) -> Mapping[str, str]:
        record = self._pipeline.record(drawn.wanted)
        marks = {name.title(): record[name] for name in REPRODUCTION if name in record}
        return {
            **{f"X-DermaFlux-{name}": text for name, text in marks.items()},
            "X-DermaFlux-Prompt-Tokens": str(drawn.prompt_tokens),
            "Content-Disposition": f'inline; filename="dermaflux-{drawn.wanted.seed}.png"',
            "Cache-Control": "no-store",
        }

    def _told(self, drawn: Drawn) -> StreamImage:
        record = self._pipeline.record(drawn.wanted)
        return StreamImage(
            **vars(drawn.wanted),
            bundle=record["bundle"],
            engine=record["engine"],
            precision=record["precision"],
            prompt_tokens=drawn.prompt_tokens,
            text_length=self._pipeline.model.text_length,
            png=base64.b64encode(drawn.png).decode("ascii"),
        )


class _EventStream(StreamingResponse):
    """Ends the job with the response, however that ends."""

    def __init__(self, events: AsyncGenerator[str, None], job: Job[Any]) -> None:
        # Proxies such as nginx would else hold the events back until the image is there.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.stop()


def _prompt(body: GenerateRequest) -> str:
    if body.lesion is None:
        assert body.prompt is not None, "the schema wants one of them"
        return body.prompt
    return caption(Lesion.from_mapping(body.lesion.model_dump(exclude_none=True)))


def _event(name: str, data: BaseModel, *, exclude_none: bool = False) -> str:
    return f"event: {name}\ndata: {data.model_dump_json(exclude_none=exclude_none)}\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
