"""`POST /v1/classify` and `/v1/classify/batch`: photographs in, calibrated decisions out.

Nothing is computed here: who scores is behind `serving.scores`, in a process of its own where the
service runs, and puts photographs of several callers together. The files of one form are scored a
few at a time, so that a form of many does not make everybody else wait for all of it; each has an
answer or an error of its own.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Final, TypeVar, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dermaflux.errors import Cancelled
from serving.audit.record import answer_hash
from serving.body import read_image, read_images
from serving.card import ClassifierCard
from serving.metrics import Metrics
from serving.places import Places
from serving.records import note
from serving.replies import Refusal, error_reply, request_id
from serving.schema import (
    Classification,
    ClassifiedFile,
    ClassifiedFiles,
    ErrorCode,
    Label,
    Refused,
)
from serving.scores import Scores, Trouble, UnavailableError
from serving.scoring import Answer, Fault, Kind, Photograph
from serving.settings import Settings

T = TypeVar("T")

FORMS: Final = 4
"""Forms of many files in memory at a time; each may be a hundred megabytes."""
AT_ONCE: Final = 8
"""Files of one form that are scored at a time: a batch of the classifier."""
COME_BACK_SECONDS: Final = 5
"""`Retry-After` while the classifier cannot be had; it is started again within ten seconds."""

_STATUS: Final[Mapping[Kind, tuple[int, ErrorCode]]] = {
    "invalid_image": (400, "invalid_image"),
    "unsuitable_image": (422, "unsuitable_image"),
    "no_saliency": (422, "invalid_request"),
    "deadline": (504, "deadline"),
}


class Classifying:
    """Both routes, over a classifier of this card, or over none where the bundle has none."""

    def __init__(
        self,
        scores: Scores | None,
        card: ClassifierCard | None,
        bundle: str,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._scores = scores
        self._card = card
        self._bundle = bundle
        self._metrics = metrics
        self._settings = settings
        self._places = Places(settings.photographs)
        self._forms = 0

    async def photograph(self, request: Request) -> Response:
        """The answer as JSON, see `serving.schema.Classification`."""
        scores = self._available()
        saliency = _saliency(request)
        data = await read_image(
            request, self._settings.max_upload_bytes, self._settings.deadline_seconds
        )
        with self._places.taken(1):
            deadline = time.monotonic() + self._settings.deadline_seconds
            work = self._classified(scores, data, saliency, deadline, request)
            answer = await _unless_gone(request, work)
        told = answer.model_dump()
        await note(request, [answer_hash(told)])
        return JSONResponse(told, headers={"Cache-Control": "no-store"})

    async def batch(self, request: Request) -> Response:
        """The answers as JSON, in the order of the form's files; see `ClassifiedFiles`."""
        scores = self._available()
        saliency = _saliency(request)
        if self._forms >= FORMS:
            crowded = f"{FORMS} forms of photographs are being answered; come back in a second."
            raise Refusal(429, "busy", crowded, headers={"Retry-After": "1"})
        self._forms += 1
        try:
            files = await read_images(
                request,
                self._settings.max_batch_bytes,
                self._settings.max_batch_files,
                self._settings.deadline_seconds,
            )
            with self._places.taken(len(files)):
                work = self._each(scores, files, saliency, request)
                results = await _unless_gone(request, work)
        finally:
            self._forms -= 1
        found = [one.result.model_dump() for one in results if one.result is not None]
        await note(request, [answer_hash(one) for one in found])
        answer = ClassifiedFiles(results=results)
        return JSONResponse(answer.model_dump(), headers={"Cache-Control": "no-store"})

    def _available(self) -> Scores:
        if self._scores is None or self._card is None:
            raise Refusal(
                404,
                "no_classifier",
                "No classifier is served here: the bundle has none, or it is left out by "
                "DERMAFLUX_CLASSIFIER=0.",
            )
        trouble = self._scores.trouble()
        if trouble is not None:
            raise not_available(trouble)
        return self._scores

    async def _each(
        self, scores: Scores, files: Sequence[bytes | Refusal], saliency: bool, request: Request
    ) -> list[ClassifiedFile]:
        deadline = time.monotonic() + self._settings.deadline_seconds
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, file: bytes | Refusal) -> ClassifiedFile:
            try:
                if isinstance(file, Refusal):
                    raise file
                self._fits(file)
                async with turns:
                    found = await self._classified(scores, file, saliency, deadline, request)
            # Whatever is wrong with one file is told in its place, like that of a request.
            except Exception as error:
                told = error_reply(request, error)
                return ClassifiedFile(index=index, error=told.error)
            return ClassifiedFile(index=index, result=found)

        return list(await asyncio.gather(*(one(*item) for item in enumerate(files))))

    def _fits(self, file: bytes) -> None:
        limit = self._settings.max_upload_bytes
        if len(file) > limit:
            raise Refusal(
                413, "body_too_large", f"The file is longer than {limit:,} bytes.", field="image"
            )

    async def _classified(
        self, scores: Scores, data: bytes, saliency: bool, deadline: float, request: Request
    ) -> Classification:
        """The answer about one file, within what is left of the time.

        Raises:
            Refusal: there is none, with the reason.
        """
        begin = time.monotonic()
        photograph = Photograph(
            data=data, saliency=saliency, expires=deadline, request_id=request_id(request)
        )
        try:
            async with asyncio.timeout(deadline - begin):
                result = await scores.score(photograph)
        except TimeoutError:
            raise self._late() from None
        except UnavailableError as error:
            raise not_available(error.trouble) from None
        seconds = time.monotonic() - begin
        self._places.took(seconds)
        if result.answer is None:
            assert result.fault is not None, "a result has one of them"
            raise self._late() if result.fault.kind == "deadline" else refusal_of(result.fault)
        self._metrics.took("wait", max(0.0, seconds - result.read_seconds - result.score_seconds))
        self._metrics.took("read_image", result.read_seconds)
        self._metrics.took("classify", result.score_seconds)
        self._metrics.decision(result.answer.decision)
        return self._told(result.answer)

    def _told(self, answer: Answer) -> Classification:
        assert self._card is not None, "asked for where there is a classifier"
        saliency = None if answer.saliency is None else base64.b64encode(answer.saliency)
        return Classification(
            label=cast(Label | None, answer.label),
            probability=answer.probability,
            threshold=answer.threshold,
            abstain=self._card.abstain,
            decision=answer.decision,  # type: ignore[arg-type]
            accepted=answer.accepted,
            reasons=[Refused(code=code, text=text) for code, text in answer.reasons],  # type: ignore[arg-type]
            saliency=None if saliency is None else saliency.decode("ascii"),
            bundle=self._bundle,
        )

    def _late(self) -> Refusal:
        return Refusal(
            504,
            "deadline",
            f"It was not done within {self._settings.deadline_seconds:g} seconds; come back when "
            "the service is less busy.",
        )


def not_available(trouble: Trouble) -> Refusal:
    """503, with `Retry-After` where it passes by itself."""
    wait = {"Retry-After": str(COME_BACK_SECONDS)} if trouble.passes else {}
    return Refusal(503, "not_ready", trouble.words, headers=wait)


def refusal_of(fault: Fault) -> Refusal:
    """What to tell of a photograph without an answer; the log has more where it is our fault."""
    if fault.kind not in _STATUS:
        return Refusal(
            500, "internal", "Something failed here; the log of the service has it under this id."
        )
    status, code = _STATUS[fault.kind]
    field = "saliency" if fault.kind == "no_saliency" else "image"
    return Refusal(status, code, f"{field}: {fault.message}", field=field)


def _saliency(request: Request) -> bool:
    given = request.query_params.getlist("saliency")
    if any(text not in ("0", "1") for text in given) or len(given) > 1:
        raise Refusal(422, "invalid_request", "saliency: must be 0 or 1", field="saliency")
    return given == ["1"]


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The outcome of `work`, or `Cancelled` as soon as the client has left; `work` ends then."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Cancelled("the client has left")
        return doing.result()
    finally:
        gone.cancel()
        doing.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
