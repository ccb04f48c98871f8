"""The BentoML service: opens a bundle at start-up and mounts our app at `/`.

BentoML brings processes and probes of life; the routes, the page and the errors are ours
(`serving.app`), since BentoML's own are POST only, re-encode images and leave mounted
routes out of their document. Two services, two processes: this one draws and answers HTTP, the one
in `serving.scorer` classifies; they talk over a Unix socket.

Either opens its engines in a thread, so probes are answered from the first second, and `/readyz`
says 503 with the reason until both are proved (`serving.readiness`). If the classifier's process
dies, `/readyz` and its routes say 503 until BentoML has started another, within some ten seconds,
and generation goes on; in a container BentoML ends with it, and the container is started again.
SIGTERM ends both once what they have begun is finished (`serving.draining`).

    DERMAFLUX_BUNDLE=bundles/mini bentoml serve serving.service:DermaFlux --port 8000
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import aiohttp
import bentoml
from bentoml.exceptions import BentoMLException

from dermaflux.bundle import Bundle
from dermaflux.doctor import damaged, files_of
from dermaflux.engines import EAGER, Choice, choose
from dermaflux.errors import BundleError, DermaFluxError, EngineError
from dermaflux.pipeline import Pipeline
from dermaflux.residency import planned
from dermaflux.tiers import classifier_tier, tier
from serving import records
from serving.access import Access, refuse_open_door
from serving.app import OWN_PATHS, SYSTEM_PATHS, SecurityHeaders, create_app, paths, witnesses
from serving.card import GoldenCard, card_of
from serving.draining import Work, finish_before_exit
from serving.framework import listening_host
from serving.readiness import Readiness, prove
from serving.records import Records
from serving.remote import Remote
from serving.scorer import ENVIRONMENT, Scorer, Untimed, refuse_pickle_over_tcp
from serving.scores import Local, Scores
from serving.settings import Settings
from serving.sources import find_bundle
from serving.starting import starting

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

LAST_SECONDS = 5.0
"""Beyond the deadline, for replies on their way when the process is told to end."""
LOST = (aiohttp.ClientError, TimeoutError, BentoMLException)
"""What BentoML's client raises where the other process cannot answer."""
UNKNOWN_PATH = "/unknown"


class _Bounded(Untimed):
    """BentoML's service with our readiness, and metrics that do not grow with what strangers send:
    BentoML labels them with the raw path, so a scan for weaknesses would make a time series of
    every address it tries.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = super().to_asgi(is_main)
        # What it answers itself; the rest has these headers from our app.
        named = SecurityHeaders(app)
        known = paths()

        async def with_known_path(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket") and scope["path"] not in known:
                scope = {**scope, "path": UNKNOWN_PATH}
            if scope["type"] == "http" and scope["path"] in OWN_PATHS:
                await _mounted(scope, receive, send)
            else:
                await (named if scope.get("path") in SYSTEM_PATHS else app)(scope, receive, send)

        return with_known_path


class _Mounted:
    """What BentoML mounts at import; the service puts its app behind it when it starts."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.work = Work()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "BentoML starts the service before it takes requests"
        with self.work:
            await self.app(scope, receive, send)


_mounted = _Mounted()


@bentoml.service(name="dermaflux", service_class=_Bounded, envs=ENVIRONMENT)
@bentoml.asgi_app(_mounted, path="/")
class DermaFlux:
    """Draws synthetic skin lesions and classifies photographs of lesions. Research use only."""

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Before any worker starts: refuse settings, bundles and engines that cannot be had,
        models that do not fit in memory, files that are not those that were exported, licences that
        the policy forbids, and an audit log or marks that cannot be kept.

        A worker that cannot start would be started again and again.
        """
        try:
            settings = Settings.from_environment(os.environ)
            bundle = Bundle.open(find_bundle(settings))
            if settings.engine == EAGER:
                raise EngineError("the eager engine runs a checkpoint; the service runs bundles")
            chosen = None if settings.tier is None else tier(settings.tier)
            choices, plan = planned(bundle, settings.engine, settings.precision, tier=chosen)
            served = [*choices.values()]
            if bundle.classifier and settings.classifier:
                served.append(_classifier(bundle, settings))
            refuse_open_door(settings, listening_host())
            refuse_pickle_over_tcp()
            _refuse_damage(bundle, served)
            records.check(settings, bundle)
        except DermaFluxError as error:
            sys.exit(f"error: {error}")

    scorer = bentoml.depends(Scorer)

    def __init__(self) -> None:
        # Imported here: with several workers it has to see the folder that BentoML names in the
        # worker's environment.
        from prometheus_client import REGISTRY

        self._settings = Settings.from_environment(os.environ)
        bundle = Bundle.open(find_bundle(self._settings))
        self._readiness = Readiness()
        self._scores = self._scores_of(bundle)
        self._app: Starlette | None = None
        self._following: asyncio.Task[None] | None = None
        self._records: Records | None = None
        _mounted.app = self._starting(bundle)
        self._readiness.begin(lambda: self._open(bundle, REGISTRY))

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """What needs the event loop."""
        finish_before_exit(
            self._readiness.leave,
            _mounted.work.over,
            seconds=self._settings.deadline_seconds + LAST_SECONDS,
        )
        if isinstance(self._scores, Remote):
            await self.scorer.__aenter__()
            self._following = asyncio.create_task(self._scores.follow())

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop what still runs."""
        if self._following is not None:
            self._following.cancel()
        if isinstance(self._scores, Local):
            self._scores.close()
        if self._app is not None:
            self._app.state.close()
        elif self._records is not None:
            self._records.close()

    def _starting(self, bundle: Bundle) -> ASGIApp:
        """What answers until the engines are there. It records already who asked."""
        try:
            access = Access.of(self._settings)
            self._records = Records.open(self._settings, bundle.id)
        except DermaFluxError:
            # It comes up again in `_open`, where readiness tells why nothing is answered.
            return starting(self._readiness)
        return starting(
            self._readiness, witnesses(self._records, access, bundle.id, self._settings)
        )

    def _scores_of(self, bundle: Bundle) -> Scores | None:
        """The classifier: BentoML gives another process, or where it has none (in a test client)
        the service itself."""
        if bundle.classifier is None or not self._settings.classifier:
            return None
        service: Any = Scorer
        scorer: Any = self.scorer
        if isinstance(scorer, service.inner):
            return Local(scorer.opening)
        return Remote(scorer.to_async, LOST)

    def _open(self, bundle: Bundle, registry: CollectorRegistry) -> GoldenCard:
        """Load the generator, put the app behind the mount, and prove it; runs in a thread."""
        begin = time.monotonic()
        settings = self._settings
        pipeline = Pipeline.open(
            bundle,
            engine=settings.engine,
            precision=settings.precision,
            tier=settings.tier,
            threads=settings.threads,
        )
        choices = [*pipeline.choices.values()]
        if bundle.classifier is not None and settings.classifier:
            choices.append(_classifier(bundle, settings))
        assert pipeline.plan is not None, "planned where a bundle is opened"
        card = card_of(bundle, choices, settings, pipeline.plan.groups)
        self._app = create_app(
            pipeline,
            self._scores,
            card,
            settings,
            registry,
            self._readiness,
            bundle,
            self._records,
        )
        _mounted.app = self._app
        seconds = time.monotonic() - begin
        logger.info("%s (%s) loaded in %.1f s", bundle.path.resolve(), bundle.id, seconds)
        found = prove(bundle, pipeline, compare=settings.golden)
        if found.result != "failed":
            self._app.state.drawing.learn()
        return found


def _classifier(bundle: Bundle, settings: Settings) -> Choice:
    """What runs the classifier, in its own process."""
    name = settings.classifier_tier
    chosen = None if name is None else classifier_tier(name)
    return choose(bundle, "classifier", settings.engine, settings.precision, tier=chosen)


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
