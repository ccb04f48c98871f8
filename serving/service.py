"""The BentoML service: opens a bundle at start-up and mounts our app at `/`.

BentoML brings workers, graceful stop, probes and `/metrics`; the routes, the page and the errors
are ours (`serving.app`), since BentoML's own are POST only, re-encode images and leave mounted
routes out of their document.

    DERMAFLUX_BUNDLE=bundles/mini bentoml serve serving.service:DermaFlux --port 8000
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml

from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.doctor import damaged, files_of
from dermaflux.engines import EAGER, Choice, choose
from dermaflux.errors import BundleError, DermaFluxError, EngineError
from dermaflux.pipeline import Pipeline
from dermaflux.residency import planned
from serving.access import refuse_open_door
from serving.app import OWN_PATHS, create_app, paths
from serving.card import card_of
from serving.framework import Configured, listening_host
from serving.readiness import Readiness, prove
from serving.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = Path("bundles/mini")
HERE = Path(__file__).resolve().parent.parent
"""The repository, or the `src` folder of a Bento."""

UNKNOWN_PATH = "/unknown"


class _Bounded(Configured):
    """BentoML's service with our readiness, without two things that grow with what strangers send.

    Its metrics are labelled with the raw path, so a scan for weaknesses would make a time series
    of every address it tries. Its timeout keeps a timer of every request until that would have
    fired, and leaves the thread running when it does; our own deadline stops the work.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app: Starlette = super().to_asgi(is_main)
        app.user_middleware = [
            middleware
            for middleware in app.user_middleware
            if getattr(middleware.cls, "__name__", "") != "TimeoutMiddleware"
        ]
        known = paths()

        async def with_known_path(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket") and scope["path"] not in known:
                scope = {**scope, "path": UNKNOWN_PATH}
            ours = scope["type"] == "http" and scope["path"] in OWN_PATHS
            await (_mounted if ours else app)(scope, receive, send)

        return with_known_path


class _Mounted:
    """What BentoML mounts at import; the service puts the app behind it when it starts."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "BentoML starts the service before it takes requests"
        await self.app(scope, receive, send)


_mounted = _Mounted()


@bentoml.service(name="dermaflux", service_class=_Bounded)
@bentoml.asgi_app(_mounted, path="/")
class DermaFlux:
    """Draws synthetic skin lesions and classifies photographs of lesions. Research use only."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse settings, bundles and engines that cannot be had,
        models that do not fit in memory, and files that are not those that were exported.

        A worker that cannot start would be started again and again.
        """
        try:
            settings = Settings.from_environment(os.environ)
            bundle = Bundle.open(find_bundle(settings))
            if settings.engine == EAGER:
                raise EngineError("the eager engine runs a checkpoint; the service runs bundles")
            choices, plan = planned(bundle, settings.engine, settings.precision)
            served = [*choices.values()]
            if bundle.classifier:
                served.append(choose(bundle, "classifier", settings.engine, settings.precision))
            refuse_open_door(settings, listening_host())
            _refuse_damage(bundle, served)
        except DermaFluxError as error:
            sys.exit(f"error: {error}")

    def __init__(self) -> None:
        # Imported here: with several workers it has to see the folder that BentoML names in the
        # worker's environment.
        from prometheus_client import REGISTRY

        _log_as_bentoml_does()
        begin = time.monotonic()
        settings = Settings.from_environment(os.environ)
        bundle = Bundle.open(find_bundle(settings))
        forced: Mapping[str, Any] = {
            "engine": settings.engine,
            "precision": settings.precision,
            "threads": settings.threads,
        }
        # Beside each other: opening a graph is mostly the work of one core.
        with ThreadPoolExecutor(1) as pool:
            scorer = pool.submit(Classifier.open, bundle, **forced) if bundle.classifier else None
            pipeline = Pipeline.open(bundle, **forced)
            classifier = scorer.result() if scorer else None
        choices = [*pipeline.choices.values()]
        if classifier is not None and classifier.choice is not None:
            choices.append(classifier.choice)
        assert pipeline.plan is not None, "planned where a bundle is opened"
        card = card_of(bundle, choices, settings, pipeline.plan.groups)
        readiness = Readiness()
        self._app = create_app(pipeline, classifier, card, settings, REGISTRY, readiness)
        _mounted.app = self._app
        seconds = time.monotonic() - begin
        logger.info("%s (%s) loaded in %.1f s", bundle.path.resolve(), bundle.id, seconds)
        readiness.begin(lambda: prove(bundle, pipeline, classifier, compare=settings.golden))

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop what still runs."""
        self._app.state.close()


def _refuse_damage(bundle: Bundle, served: Iterable[Choice]) -> None:
    """Compare the sha256 of every file that will run; files of other precisions are not read.

    Raises:
        BundleError: with the files that differ.
    """
    wrong = damaged(bundle, files_of(bundle, served))
    if wrong:
        raise BundleError(
            f"not what was exported in {bundle.path}, by sha256: {', '.join(wrong)}. Copy the "
            f"bundle anew, or make it with: python -m export CHECKPOINT --out {bundle.path}"
        )


def _log_as_bentoml_does() -> None:
    """Our records go where BentoML's go, in its form; without this only warnings are seen."""
    for name in ("dermaflux", "serving"):
        ours = logging.getLogger(name)
        ours.handlers = logging.getLogger("bentoml").handlers
        ours.setLevel(logging.INFO)
        ours.propagate = False


def find_bundle(settings: Settings) -> Path:
    """The bundle of the settings, else bundles/mini of the working folder, else that beside us.

    Raises:
        BundleError: the default is nowhere.
    """
    if settings.bundle is not None:
        return settings.bundle
    for folder in (DEFAULT_BUNDLE, HERE / DEFAULT_BUNDLE):
        if folder.is_dir():
            return folder
    raise BundleError(
        f"there is no bundle at {DEFAULT_BUNDLE}. Make it with: "
        f"python -m export models/mini --out {DEFAULT_BUNDLE}, or name one in DERMAFLUX_BUNDLE"
    )
