"""What the service answers while its engines are being loaded: 503 with the reason, at any address.

Loading takes seconds to minutes, and a probe that gets no answer is taken for a process that hangs.
`/livez` is answered by BentoML meanwhile; everything else by this, in the form of all our errors.
Who asks for work meanwhile, and is sent away, stands in the audit log like everybody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.app import ROUTES, SecurityHeaders
from serving.audit.middleware import PREFIX
from serving.logs import AccessLog
from serving.readiness import Readiness
from serving.replies import Refusal, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def starting(readiness: Readiness, witnesses: Sequence[Middleware] = ()) -> ASGIApp:
    """The app until the one that can draw is there; `witnesses` are `serving.app`'s."""

    async def refuse(request: Request, _: Exception | None = None) -> Response:
        path = request.scope["path"]
        work = path.startswith(PREFIX) and request.method == ROUTES.get(path, ("", ""))[0]
        request.state.route = path if work else "starting"
        try:
            readiness.require()
        except Refusal as error:
            return error_response(request, error)
        # Between the two apps; the next request reaches the other one.
        return error_response(request, Refusal(503, "not_ready", "It starts; come back."))

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(
        routes=[Route("/{path:path}", refuse, methods=methods)],
        middleware=[Middleware(SecurityHeaders), Middleware(AccessLog), *witnesses],
        # Methods that nobody knows are told the same.
        exception_handlers={HTTPException: refuse},
    )
