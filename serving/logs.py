"""The log: a line a record, as text or JSON, without anything of what callers sent.

A request leaves one line: its id, the caller's id, the route's template, the status and the time
it took. Prompts, pixels, file names, queries and header values are in no line. Exceptions are where
such things slip in (`KeyError: 'a name'`), so of one that was not expected only the types and
places are told; what OSError and our own errors about engines and bundles say is told as well.

    2026-01-31T09:00:00.123Z INFO serving.requests POST /v1/generate 200 caller=ward3 seconds=1.204
    {"time": "2026-01-31T09:00:00.123Z", "level": "INFO", "logger": "serving.requests", ...}

What native libraries write to stderr by themselves is not a record and stays as it is.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request

from dermaflux.errors import DermaFluxError, ImageError, RequestError
from serving.replies import CLIENT_LEFT, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
requests = logging.getLogger("serving.requests")

FIELDS: Final = ("request", "caller", "method", "route", "status", "seconds")
"""Of a record's own (`extra`), in the order of a line."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SPOKEN_FOR: Final = ("bentoml", "circus", "dermaflux", "serving", "uvicorn")
"""Loggers whose messages were read and repeat nothing of a request; of others one line is kept."""
TALKATIVE: Final = ("PIL", "asyncio", "httpcore", "httpx", "multipart", "python_multipart")
"""Tell what they parse where a debug level is set for all (`BENTOML_DEBUG`)."""
MAX_PLACES: Final = 30
"""Of one exception; what runs into itself has a thousand."""
MAX_CAUSES: Final = 8
"""One behind the other; they may go round in a circle."""
NOISE: Final = 10
"""Warnings of uvicorn a minute: any stranger can cause one with a line that is no HTTP."""
QUIET_ROUTES: Final = frozenset({"/readyz", "/metrics", "starting"})
"""Asked every few seconds by machines."""

_asked: ContextVar[str | None] = ContextVar("asked", default=None)
"""The id of the request that is being answered."""


def configure(form: str) -> None:
    """Let every handler that BentoML set up write in this form (`text` or `json`), ours too.

    Also for warnings and for exceptions that nobody caught, which Python else prints whole.
    """
    formatter = _Json() if form == "json" else _Text()
    for name in ("dermaflux", "serving"):
        ours = logging.getLogger(name)
        ours.handlers = logging.getLogger("bentoml").handlers
        ours.setLevel(logging.INFO)
        ours.propagate = False
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for log in known:
        # Else what has a handler of its own is written by the root's too.
        log.propagate = log.propagate and not log.handlers
    logging.getLogger("uvicorn.error").filters = [Seldom()]
    for handler in {one for log in (logging.root, *known) for one in log.handlers}:
        handler.setFormatter(formatter)
        handler.filters.clear()
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda told: _uncaught(
        told.exc_type, told.exc_value or told.exc_type(), told.exc_traceback
    )
    sys.unraisablehook = lambda told: _uncaught(
        told.exc_type, told.exc_value or told.exc_type(), told.exc_traceback
    )


def outline(error: BaseException) -> str:
    """Types and places of an exception and of what it came from, the first one first."""
    return "\n".join(_outlined(error))


class Seldom(logging.Filter):
    """Lets so many warnings a minute through, and says with the next how many it held back."""

    def __init__(self, most: int = NOISE, seconds: float = 60.0) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._begin, self._count = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written; all but warnings are."""
        if record.levelno != logging.WARNING:
            return True
        if not 0 <= record.created - self._begin < self._seconds:
            held = self._count - self._most
            if held > 0:
                record.msg, record.args = f"{record.getMessage()} ({held} more before)", ()
            self._begin, self._count = record.created, 0
        self._count += 1
        return self._count <= self._most


class AccessLog:
    """Writes a line when a reply has ended, and gives every reply its request id. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        request = Request(scope)
        identity = request_id(request)
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = [item for item in message["headers"] if item[0] != b"x-request-id"]
                message["headers"] = [*given, (b"x-request-id", identity.encode("ascii"))]
            await send(message)

        token = _asked.set(identity)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _asked.reset(token)
            self._tell(request, status, time.monotonic() - begin)

    def _tell(self, request: Request, status: int, seconds: float) -> None:
        state = request.state
        route = getattr(state, "route", "/static" if status == 200 else "other")
        if route in QUIET_ROUTES and status in (200, 503):
            return
        method = request.method if request.method in METHODS else "other"
        caller = getattr(getattr(state, "caller", None), "name", "-")
        more = {"request": state.request_id, "caller": caller, "method": method}
        more |= {"route": route, "status": status, "seconds": round(seconds, 3)}
        requests.info("%s %s %d", method, route, status, extra=more)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    words = record.getMessage()
    if record.name.partition(".")[0] not in SPOKEN_FOR:
        # asyncio adds the task with its arguments, warnings a line of the source.
        words = words.strip().partition("\n")[0]
    told = {name: getattr(record, name, None) for name in FIELDS}
    told["request"] = told["request"] or _asked.get()
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    facts = {
        "time": when.replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "process": record.process,
        "message": words.strip(),
        **{name: told[name] for name in FIELDS if told[name] is not None},
    }
    if record.exc_info and record.exc_info[1] is not None:
        facts["exception"] = outline(record.exc_info[1])
    return facts


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_facts(record), ensure_ascii=True)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = _facts(record)
        line = f"{facts['time']} {facts['level']} {facts['logger']} {facts['message']}"
        # What the message of a request's line says already.
        said = ("method", "route", "status") if record.name == requests.name else ()
        for name in FIELDS:
            if name in facts and name not in said:
                line += f" {name}={facts[name]}"
        # One record stays one line, whatever a message holds.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        return line + "".join(
            f"\n    {one}" for one in facts.get("exception", "").split("\n") if one
        )


def _outlined(error: BaseException, depth: int = 0) -> Iterator[str]:
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and depth < MAX_CAUSES:
        yield from _outlined(before, depth + 1)
        yield "which led to"
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions if depth < MAX_CAUSES else ():
            yield from _outlined(one, depth + 1)
        yield "in"
    places = []
    place: TracebackType | None = error.__traceback__
    while place is not None:
        code = place.tb_frame.f_code
        places.append(f"{code.co_filename}:{place.tb_lineno} {code.co_name}")
        place = place.tb_next
    yield from places[-MAX_PLACES:]
    yield type(error).__name__ + _words(error)


def _words(error: BaseException) -> str:
    """What may be told of its text."""
    if isinstance(error, OSError) and error.strerror:
        return f": {error.strerror}"
    if isinstance(error, DermaFluxError) and not isinstance(error, RequestError | ImageError):
        return f": {error}"
    return ""


def _uncaught(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        logger.critical("nobody caught this", exc_info=error)
