"""What of BentoML is set from our settings, and where it listens.

BentoML reads its configuration from files and variables of its own, too late for sentences and with
defaults that do not suit a hospital: its access log writes raw addresses with queries, its ciphers
are weak, its telemetry is on. A service of this class has ours instead, in every process, whatever
the command line was.

    @bentoml.service(name="dermaflux", service_class=Configured)

Its process manager (circus) takes commands, also to run any program, from whoever connects to two
loopback ports; here it listens in a folder of this user alone. And the processes that answer speak
through `serving.connections`, which gives clients their time.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

# BentoML's own class of services, for its parameter `service_class`; it has no public address.
from _bentoml_sdk import Service  # type: ignore[import-untyped]

from dermaflux.errors import DermaFluxError
from serving import logs, tls
from serving.settings import SettingError, Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Receive, Scope, Send

EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http"
TRACE_HEADERS: Final = (b"traceparent", b"tracestate")
WHOLE: Final = "dermaflux.scope"


class Configured(Service[Any]):  # type: ignore[misc]
    """BentoML's service under our settings; a wrong one ends the process with a sentence."""

    def inject_config(self) -> None:
        """Called before the command opens a socket, and in every process before it answers."""
        from bentoml._internal.configuration.containers import BentoMLContainer
        from bentoml._internal.utils import deep_merge

        super().inject_config()
        _send_no_telemetry()
        _keep_control_private()
        _give_clients_their_time()
        try:
            settings = Settings.from_environment(os.environ)
            config = BentoMLContainer.config.get()
            ours = configuration(settings, config["api_server"]["ssl"]["ciphers"])
        except DermaFluxError as error:
            sys.exit(f"error: {error}")
        deep_merge(config, ours)
        BentoMLContainer.config.set(config)
        if _started_by_bentoml():
            logs.configure(settings.log)

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """BentoML's app, whose traces hold no query and no header of a caller.

        BentoML records a trace of every request, also where nobody is told of it; here only where
        somebody is. Nothing of ours reads it: requests have ids of their own (`serving.logs`).
        """
        app: Starlette = super().to_asgi(is_main)
        tracing = [one for one in app.user_middleware if _traces(one)]
        for middleware in tracing:
            if _told_to_somebody():
                middleware.cls = discreet(middleware.cls)
            else:
                app.user_middleware.remove(middleware)
        return app


def discreet(tracing: Callable[..., ASGIApp]) -> Callable[..., ASGIApp]:
    """A tracing middleware that sees of a request its path, and of its headers whose trace it is.

    The app behind it gets the request whole. Paths are those that the service knows
    (`serving.service`), so they say nothing of a caller either.
    """

    def make(app: ASGIApp, *arguments: Any, **options: Any) -> ASGIApp:
        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope.get(WHOLE, scope), receive, send)

        traced = tracing(inside, *arguments, **options)

        async def outside(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                headers = [one for one in scope["headers"] if one[0] in TRACE_HEADERS]
                less = {"query_string": b"", "headers": headers, "client": None, WHOLE: scope}
                scope = {**scope, **less}
            await traced(scope, receive, send)

        return outside

    return make


def configuration(settings: Settings, ciphers: str | None) -> dict[str, Any]:
    """What these settings change in BentoML's configuration, of which `ciphers` are there now.

    Raises:
        SettingError: files of TLS are wrong, or traces are wanted without what sends them.
    """
    secure = tls.options(settings)
    if not secure and ciphers in (None, tls.TRAP):
        secure = {"ciphers": tls.CIPHERS}
    found: dict[str, Any] = {
        "api_server": {"ssl": secure, "logging": {"access": {"enabled": False}}}
    }
    if settings.otel_endpoint is None:
        return found
    if not settings.otel_endpoint.startswith(("http://", "https://")):
        raise SettingError(
            f"DERMAFLUX_OTEL_ENDPOINT is {settings.otel_endpoint!r}; it needs an address such as "
            "http://collector:4318/v1/traces"
        )
    if not _installed(EXPORTER):
        raise SettingError(
            "DERMAFLUX_OTEL_ENDPOINT is set, but what sends traces is not installed; use: "
            "pip install opentelemetry-exporter-otlp-proto-http"
        )
    otlp = {"protocol": "http", "endpoint": settings.otel_endpoint}
    found["tracing"] = {"exporter_type": "otlp", "sample_rate": 1.0, "otlp": otlp}
    return found


def listening_host() -> str | None:
    """The address that `bentoml serve` was told to listen on, or takes by default.

    None where another program starts the service, which alone knows.
    """
    from bentoml._internal.configuration.containers import BentoMLContainer

    context = click.get_current_context(silent=True)
    if context is None or "host" not in context.params:
        return None
    return str(context.params["host"] or BentoMLContainer.http.host.get())


def private_arbiter(watchers: list[Any], *, threaded: bool = False, **options: Any) -> Any:
    """BentoML's process manager, which only this user can command.

    In place of `bentoml._internal.utils.circus.create_standalone_arbiter`, which takes ports.
    """
    from bentoml._internal.utils.circus import Arbiter, ThreadedArbiter

    folder = Path(tempfile.mkdtemp(prefix="dermaflux-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ends = {"endpoint": f"ipc://{folder}/control", "pubsub_endpoint": f"ipc://{folder}/news"}
    # BentoML's own number: circus' default asks for processes that are not up yet.
    options = {"check_delay": 10, **ends, **options}
    return (ThreadedArbiter if threaded else Arbiter)(watchers, **options)


def close_ports_of_others(folder: Path = Path("/proc/self/fd")) -> None:
    """Let go of sockets that listen on a network, which a process got from its parent.

    For a process that answers on a Unix socket: it would keep the service's port taken, and never
    answer there, if it outlived the one whose port it is.
    """
    for number in [int(one.name) for one in folder.iterdir()] if folder.exists() else []:
        try:
            with socket.socket(fileno=os.dup(number)) as copy:
                network = copy.family in (socket.AF_INET, socket.AF_INET6)
                listens = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:  # no socket, or the one that listed the folder
            continue
        if network and listens:
            os.close(number)


def _keep_control_private() -> None:
    from bentoml._internal.utils import circus

    circus.create_standalone_arbiter = private_arbiter


def _give_clients_their_time() -> None:
    """BentoML lets uvicorn choose what speaks HTTP."""
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = "serving.connections:Connection"


def _traces(middleware: Middleware) -> bool:
    return getattr(middleware.cls, "__name__", "") == "OpenTelemetryMiddleware"


def _told_to_somebody() -> bool:
    """Whether traces are sent: by our settings, or by a configuration of BentoML's own."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    return BentoMLContainer.tracing.exporter_type.get() is not None


def _started_by_bentoml() -> bool:
    """Whether this is a process of `bentoml serve`, whose log is ours, not a test or a build."""
    return click.get_current_context(silent=True) is not None


def _send_no_telemetry() -> None:
    """BentoML asks for its variable once and keeps the answer; the word has to be `true`."""
    from bentoml._internal.utils.analytics.usage_stats import BENTOML_DO_NOT_TRACK, do_not_track

    os.environ[BENTOML_DO_NOT_TRACK] = "true"
    do_not_track.cache_clear()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
