"""The one form of our errors, and the only place that turns an exception into a reply.

    {"error": {"code": "invalid_request", "message": "steps: ...", "field": "steps",
               "request_id": "..."}}

`code` is stable and meant for programs, `message` is a sentence for a person. Anything expected is
a 4xx (or 504 past the deadline); the rest is a 500 whose traceback goes to the log alone, under
the request id.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dermaflux.errors import Cancelled, ImageError, RequestError
from serving import openai_form
from serving.schema import ErrorCode, ErrorDetail, ErrorReply

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Nobody reads this status: it is for the metrics and the log."""

LONGEST = 600
"""Characters of a message; the longest of ours has some 300."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Refusal(Exception):
    """An expected failure that already knows its reply."""

    def __init__(
        self,
        status: int,
        code: ErrorCode,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.headers = dict(headers or {})


def request_id(request: Request) -> str:
    """The caller's `X-Request-ID` if it is harmless in a log, else a new one; one per request."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return str(request.state.request_id)


def refusal(error: Exception) -> Refusal:
    """What to tell the client about `error`; an unexpected one gives a 500 without details."""
    match error:
        case Refusal():
            return error
        case RequestError():
            return Refusal(422, "invalid_request", str(error), field=error.field)
        case ImageError():
            return Refusal(400, "invalid_image", f"image: {error}", field="image")
        case Cancelled() | ClientDisconnect():
            return Refusal(CLIENT_LEFT, "cancelled", "The request was cancelled by its sender.")
        case HTTPException(status_code=404):
            return Refusal(
                404, "not_found", "There is nothing at this address; see /openapi.json for all."
            )
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            return Refusal(
                405,
                "method_not_allowed",
                f"This address does not take the method used; use {allowed}.",
                headers={"Allow": allowed},
            )
        case HTTPException() if error.status_code < 500:
            return Refusal(error.status_code, "invalid_request", error.detail)
    return Refusal(
        500, "internal", "Something failed here; the log of the service has it under this id."
    )


def error_reply(request: Request, error: Exception) -> ErrorReply:
    """The JSON form of `error`; logs it first where it was not expected."""
    told = refusal(error)
    if told.code == "internal":
        logger.error("the request failed", exc_info=error, extra={"request": request_id(request)})
    return ErrorReply(
        error=ErrorDetail(
            code=told.code,
            message=_sentence(str(told)),
            field=told.field,
            request_id=request_id(request),
        )
    )


def error_response(request: Request, error: Exception) -> Response:
    """The HTTP reply for `error`."""
    told = refusal(error)
    status, content = told.status, error_reply(request, error).model_dump(exclude_none=True)
    if request.scope["path"] in openai_form.PATHS:
        status, content = openai_form.error_form(
            status, told.code, content["error"]["message"], told.field
        )
    return JSONResponse(
        content,
        status_code=status,
        headers={**told.headers, "Cache-Control": "no-store"},
    )


def let_go(error: BaseException) -> None:
    """Drop the places of an exception that has been answered, and of what it came from.

    Through them it holds all variables of its way, an upload among them; and often one of those is
    the exception itself, or a task that ended with it. Such a circle stays in memory until Python's
    next collection of everything, which a service that refuses large uploads may not live to see.
    """
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]
            left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()


def _sentence(text: str) -> str:
    """With one full stop, and without the middle of a long value that it may repeat."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text.removesuffix(".") + "."
