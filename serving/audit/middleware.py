"""A line in the audit log for each request, before its reply goes out. Plain ASGI.

    Middleware(Audited, log=log, bundle=card.bundle)      # inside AccessLog, outside Admission

Requests for `/v1/` are recorded, and whoever was turned away at the door (401, 403). An endpoint
says what came out in `request.state.results`, sha256 in hex; one that sends its reply bit by bit
calls `recorded` before it sends a result. Where the log is required and cannot be written, the
caller gets 503 in place of the reply, and no work is begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers
from starlette.requests import Request

from serving.audit.log import AuditLog
from serving.audit.record import Event
from serving.audit.secret import AuditError
from serving.replies import Refusal, error_response, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREFIX: Final = "/v1/"
DOOR: Final = (401, 403)
RETRY_SECONDS: Final = "60"
"""Somebody has to make room on a disk."""


class Audited:
    """Records who asked for what, and what came out. `addresses`: of callers without a key too."""

    def __init__(
        self, app: ASGIApp, log: AuditLog, bundle: str, *, addresses: bool = False
    ) -> None:
        self._app = app
        self._log = log
        self._bundle = bundle
        self._addresses = addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if request.method == "POST" and scope["path"].startswith(PREFIX):
                await asyncio.to_thread(self._log.check)
        except AuditError:
            await _unavailable(request)(scope, receive, send)
            return
        await _Reply(self, request, scope, receive, send).answer()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's own reply."""
        await self._app(scope, receive, send)

    async def write(
        self, request: Request, outcome: str, status: int | None, results: Sequence[str]
    ) -> None:
        """One line.

        Raises:
            AuditError: it is not in the log, where it has to be.
        """
        caller = getattr(request.state, "caller", None)
        host = request.client.host if request.client and self._addresses else ""
        event = Event(
            caller=getattr(caller, "name", "") or "",
            route=_route(request),
            outcome=outcome,
            status=status,
            bundle=self._bundle,
            results=tuple(results),
            request=request_id(request),
            # A socket of the file system, or a test's, has no address.
            address=host if set(host) <= set("0123456789abcdefABCDEF.:") else "",
        )
        # The disk may let it wait; other requests do not.
        await asyncio.to_thread(self._log.append, event)


async def recorded(request: Request, outcome: str, results: Sequence[str]) -> None:
    """Record a result that is sent while the reply goes on. Without an audit log nothing happens.

    Raises:
        AuditError: it is not in the log, where it has to be: it must not be sent.
    """
    reply = getattr(request.state, "audited", None)
    if reply is not None:
        await reply.record(outcome, results)


class _Reply:
    """The messages of one reply on their way out."""

    def __init__(
        self, audited: Audited, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._audited = audited
        self._request = request
        self._ways = (scope, receive, send)
        self._status: int | None = None
        self._streams = False
        self._refused = False
        self._told = False
        request.state.audited = self

    async def answer(self) -> None:
        scope, receive, _ = self._ways
        outcome = "left"
        try:
            await self._audited.answer(scope, receive, self._pass_on)
            outcome = "ended" if self._streams else "left"
        except BaseException as error:
            outcome = "left" if isinstance(error, asyncio.CancelledError) else "failed"
            raise
        finally:
            if not self._told and not self._refused and self._concerns():
                # There is no reply any more that could be held back.
                await self._write_anyway(outcome)

    async def record(self, outcome: str, results: Sequence[str]) -> None:
        await self._audited.write(self._request, outcome, self._status, results)
        self._told = True

    async def _pass_on(self, message: Message) -> None:
        scope, receive, send = self._ways
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self._streams = kind.startswith("text/event-stream")
            if self._concerns() and not self._streams:
                state = self._request.state
                results = getattr(state, "results", ())
                try:
                    await self.record(
                        getattr(state, "outcome", _outcome(message["status"])), results
                    )
                except AuditError:
                    self._refused = True
                    await _unavailable(self._request)(scope, receive, send)
                    return
        await send(message)

    def _concerns(self) -> bool:
        return self._status in DOOR or _route(self._request).startswith(PREFIX)

    async def _write_anyway(self, outcome: str) -> None:
        try:
            await self.record(outcome, getattr(self._request.state, "results", ()))
        except AuditError:
            return  # the log has told it, and counts it as missing


def _outcome(status: int) -> str:
    return "done" if status < 400 else "refused" if status < 500 else "failed"


def _route(request: Request) -> str:
    """The template, which the app sets when it has found one; "" for addresses of no route."""
    route = getattr(request.state, "route", "")
    return route if isinstance(route, str) and route.startswith("/") else ""


def _unavailable(request: Request) -> ASGIApp:
    words = "What is done here has to be recorded, and cannot be at the moment; come back later."
    headers = {"Retry-After": RETRY_SECONDS}
    return error_response(request, Refusal(503, "not_ready", words, headers=headers))
