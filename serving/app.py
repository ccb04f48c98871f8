"""The ASGI app: routes, page and headers over a pipeline, a classifier and their card.

Knows nothing of BentoML and opens nothing, so a test runs it over fake engines; `serving.service`
opens a bundle and puts the app behind BentoML. Who may call what stands in one table, `ROUTES`:
what is not in it answers 404, and a route in it that has no endpoint stops the start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dermaflux.bundle import Bundle
from dermaflux.pipeline import Pipeline
from serving.access import Access, Admission, caller_of, require
from serving.audit.middleware import Audited
from serving.card import ModelCard
from serving.classify import Classifying, not_available
from serving.doctor.report import report
from serving.door import Door
from serving.drawing import Drawing
from serving.generate import Generation
from serving.gpu import Gpus
from serving.keyring import Role
from serving.logs import AccessLog
from serving.marking import Marking
from serving.metrics import Metrics
from serving.openai_images import OpenAIImages
from serving.openapi import document
from serving.orders import Orders
from serving.readiness import Readiness
from serving.records import Records
from serving.replies import CLIENT_LEFT, error_response, let_go
from serving.scores import Scores
from serving.scrape import exposition
from serving.settings import Settings
from serving.standing import Doctor, Standing

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).parent / "static"
READY_PATH = "/readyz"
METRICS_PATH = "/metrics"
SYSTEM_PATHS = ("/livez", "/healthz")
"""Answered by BentoML before the app is asked; what reaches the app there has a wrong method."""
OWN_PATHS = (READY_PATH, METRICS_PATH)
"""BentoML would answer these too: the first without knowing what is drawn, the second anybody."""

Whom = Role | Literal["anybody", "known"]
"""Who may call a route: everybody, every caller with a key (or let in without), or one's role."""

ROUTES: Mapping[str, tuple[Literal["GET", "POST"], Whom]] = {
    "/v1/generate": ("POST", "generate"),
    "/v1/generate/stream": ("POST", "generate"),
    "/v1/images/generations": ("POST", "generate"),
    "/v1/classify": ("POST", "classify"),
    "/v1/classify/batch": ("POST", "classify"),
    "/v1/verify": ("POST", "known"),
    "/v1/queue": ("GET", "known"),
    "/v1/model": ("GET", "known"),
    "/v1/models": ("GET", "known"),
    METRICS_PATH: ("GET", "admin"),
    READY_PATH: ("GET", "anybody"),
    "/openapi.json": ("GET", "anybody"),
    "/": ("GET", "anybody"),
}

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
HSTS = "max-age=31536000"
"""A year; only over TLS, where a browser heeds it."""

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(
    pipeline: Pipeline,
    scores: Scores | None,
    card: ModelCard,
    settings: Settings,
    registry: CollectorRegistry,
    readiness: Readiness,
    bundle: Bundle | None = None,
    records: Records | None = None,
) -> Starlette:
    """The app over parts that are loaded; its `state.close()` ends what still runs.

    `bundle` is what the doctor looks at for an admin; without one nothing is looked at. `records`
    are those that were opened for `serving.starting`, and closed with the rest.

    Raises:
        KeysError: the keys that the settings name cannot be read.
        SettingError, MarksError, RegistryError, AuditError: see `serving.records.Records.open`.
    """
    access = Access.of(settings)
    records = records or Records.open(settings, card.bundle)
    metrics = Metrics(registry)
    drawing = Drawing(pipeline, metrics, settings)
    marking = Marking(records, settings)
    orders = Orders(pipeline, drawing, metrics, marking)
    generation = Generation(pipeline, orders, settings)
    openai = OpenAIImages(generation, orders, card, settings, (2 * pipeline.model.scale) ** 2)
    classifying = Classifying(scores, card.classifier, card.bundle, metrics, settings)
    keyed = settings.keys is not None or bool(settings.keys_inline)
    doctor = None
    # It names folders: where strangers are let in without a key, nobody is told.
    if bundle is not None and (keyed or not settings.open):
        doctor = Doctor(lambda: report(settings, bundle, core=False))
    standing = Standing(card, drawing, readiness, doctor, scores)
    whom = {path: who for path, (_, who) in ROUTES.items()}
    if settings.metrics_open:
        whom[METRICS_PATH] = "anybody"
    openapi = document(card, whom, keyed=keyed)
    gpus = Gpus()

    async def send_document(_: Request) -> Response:
        return JSONResponse(openapi)

    async def send_metrics(_: Request) -> Response:
        text, kind = exposition(registry, now=[gpus])
        return Response(text, headers={"Content-Type": kind, "Cache-Control": "no-store"})

    async def send_readiness(_: Request) -> Response:
        readiness.require()
        trouble = None if scores is None else scores.trouble()
        if trouble is not None:
            raise not_available(trouble)
        return JSONResponse({"ready": True}, headers={"Cache-Control": "no-store"})

    async def send_page(_: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for HTTPException alone"
        if error.status_code == 404 and request.url.path in SYSTEM_PATHS:
            error = HTTPException(405, headers={"Allow": "GET, HEAD"})
        metrics.request("other", error.status_code)
        return error_response(request, error)

    def close() -> None:
        drawing.close()
        orders.close()
        marking.close()
        records.close()

    # Bounds the memory of bodies being read, before any queue is asked.
    largest = max(settings.max_upload_bytes, settings.max_batch_bytes, settings.max_json_bytes)
    door = Door(settings.open_requests, 2 * largest)

    def route(path: str, endpoint: Endpoint) -> Route:
        method, _ = ROUTES[path]
        # Only bodies take memory: the page and the card answer however crowded it is.
        guarded = _through(door, readiness, endpoint) if method == "POST" else endpoint
        return Route(path, _answering(path, _for(whom[path], guarded), metrics), methods=[method])

    endpoints: Mapping[str, Endpoint] = {
        "/v1/generate": generation.image,
        "/v1/generate/stream": generation.stream,
        "/v1/classify": classifying.photograph,
        "/v1/classify/batch": classifying.batch,
        "/v1/images/generations": openai.images,
        "/v1/verify": marking.verify,
        "/v1/queue": standing.queue,
        "/v1/model": standing.model,
        "/v1/models": openai.models,
        METRICS_PATH: send_metrics,
        READY_PATH: send_readiness,
        "/openapi.json": send_document,
        "/": send_page,
    }
    app = Starlette(
        routes=[
            *(route(path, endpoints[path]) for path in ROUTES),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            Middleware(SecurityHeaders),
            Middleware(AccessLog),
            *witnesses(records, access, card.bundle, settings),
        ],
        exception_handlers={HTTPException: not_routed},
    )
    # A redirect to the address without the slash would be one more form of reply.
    app.router.redirect_slashes = False
    app.state.close = close
    app.state.drawing = drawing
    return app


def witnesses(
    records: Records, access: Access, bundle: str, settings: Settings
) -> list[Middleware]:
    """What tells who calls and, where there is an audit log, records each request before its reply
    goes out."""
    found = [Middleware(Admission, access=access)]
    if records.audit is not None:
        addresses = settings.audit_addresses
        audited = Middleware(Audited, log=records.audit, bundle=bundle, addresses=addresses)
        found.insert(0, audited)
    return found


def paths() -> frozenset[str]:
    """Every path that can answer with something else than 404."""
    files = {f"/static/{file.relative_to(STATIC).as_posix()}" for file in STATIC.rglob("*.*")}
    return frozenset({*files, *ROUTES, *SYSTEM_PATHS})


def _for(whom: Whom, endpoint: Endpoint) -> Endpoint:
    """`endpoint` for these callers; a refusal for others, before anything of the body is read."""

    async def admit(request: Request) -> Response:
        if whom == "known":
            caller_of(request)
        elif whom != "anybody":
            require(request, whom)
        return await endpoint(request)

    return admit


def _through(door: Door, readiness: Readiness, endpoint: Endpoint) -> Endpoint:
    """`endpoint`, once ready, for as many callers at once as the door lets in; else a refusal."""

    async def enter(request: Request) -> Response:
        readiness.require()
        with door.place(caller_of(request).lane) as request.state.place:
            return await endpoint(request)

    return enter


def _answering(path: str, endpoint: Endpoint, metrics: Metrics) -> Endpoint:
    """`endpoint` whose failures are replies in our form, and counted."""

    async def answer(request: Request) -> Response:
        request.state.route = path
        try:
            response = await endpoint(request)
        except Exception as error:
            response = error_response(request, error)
            let_go(error)
            if response.status_code == CLIENT_LEFT:
                request.state.outcome = "left"
        metrics.request(path, response.status_code)
        return response

    return answer


class SecurityHeaders:
    """Adds `SECURITY_HEADERS` to every reply. Plain ASGI, so streams pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if scope.get("scheme") == "https":
                    headers["Strict-Transport-Security"] = HSTS
                # Without a word browsers keep files of the page as long as they please.
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        await self._app(scope, receive, send_with_headers)
