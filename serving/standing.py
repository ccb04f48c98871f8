"""`GET /v1/model` and `GET /v1/queue`: what serves here, and how it stands, as far as a caller may
know: which engines were not taken helps an operator, and whoever looks for a way in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.access import caller_of
from serving.card import BatchCard, ModelCard, QueueCard
from serving.drawing import Drawing
from serving.readiness import Readiness

_NOT_KEPT = {"Cache-Control": "no-store"}


class Standing:
    """The two routes over a card and what changes of it."""

    def __init__(self, card: ModelCard, drawing: Drawing, readiness: Readiness) -> None:
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
        told = self._card.model_copy(update=news).model_dump()
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
