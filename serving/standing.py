"""`GET /v1/model` and `GET /v1/queue`: what serves here, and how it stands, as far as a caller may
know: which engines were not taken helps an operator, and whoever looks for a way in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.access import caller_of
from serving.card import BatchCard, DoctorCard, ModelCard, QueueCard
from serving.doctor.report import Report
from serving.drawing import Drawing
from serving.readiness import Readiness
from serving.scores import Scores

_NOT_KEPT = {"Cache-Control": "no-store"}

FRESH_SECONDS: Final = 5.0
"""A report is given again for so long: it writes small files to try the disks."""
PATIENCE_SECONDS: Final = 2.0
"""For a report; a disk of a network that hangs must not take the card along."""


class Doctor:
    """Examines in a thread, one at a time, and remembers what came out for some seconds."""

    def __init__(
        self, examine: Callable[[], Report], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._examine = examine
        self._clock = clock
        self._told: DoctorCard | None = None
        self._at = 0.0
        self._looking: asyncio.Task[None] | None = None

    async def card(self) -> DoctorCard | None:
        """The report; the last one, or none, where a new one is not there soon."""
        if self._told is None or self._clock() - self._at >= FRESH_SECONDS:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await asyncio.wait({self._looking}, timeout=PATIENCE_SECONDS)
        return self._told

    async def _look(self) -> None:
        found = (await asyncio.to_thread(self._examine)).as_json()
        self._told = DoctorCard(healthy=found["healthy"], findings=found["findings"])
        self._at = self._clock()


class Standing:
    """The two routes over a card and what changes of it; `doctor` is for admins."""

    def __init__(
        self,
        card: ModelCard,
        drawing: Drawing,
        readiness: Readiness,
        doctor: Doctor | None = None,
        scores: Scores | None = None,
    ) -> None:
        self._scores = scores
        self._doctor = doctor
        self._card = card
        self._drawing = drawing
        self._readiness = readiness

    async def model(self, request: Request) -> Response:
        """The model card, with what the caller may do."""
        caller = caller_of(request)
        now = self._drawing.snapshot()
        news = {
            "golden": self._readiness.golden,
            "batch": BatchCard(limit=now.limit, rates=_rates(now.rates)),
            "caller": caller.name,
            "roles": sorted(caller.roles),
        }
        if caller.may("admin") and self._doctor is not None:
            news["doctor"] = await self._doctor.card()
        told = self._card.model_copy(update=news).model_dump()
        note = "" if self._scores is None else self._scores.note()
        for engine in told["engines"]:
            if engine["part"] == "classifier":
                engine["note"] = note
        if not caller.may("admin"):
            for engine in told["engines"]:
                engine["rejected"] = []
        return JSONResponse(told, headers=_NOT_KEPT)

    async def queue(self, request: Request) -> Response:
        """Counts of all, and the places of the caller's own images."""
        now = asdict(self._drawing.snapshot(caller_of(request).lane))
        told = QueueCard(**{**now, "rates": _rates(now["rates"]), "mine": list(now["mine"])})
        return JSONResponse(told.model_dump(), headers=_NOT_KEPT)


def _rates(rates: Mapping[int, float]) -> dict[str, float]:
    """For JSON, whose names are texts."""
    return {str(batch): round(rate, 3) for batch, rate in rates.items()}
