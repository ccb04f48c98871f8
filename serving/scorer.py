"""The classifier's service: a process of its own, so that it never waits for a generation.

`serving.remote` puts photographs of many callers together; a call here is a batch. Everything that
is a photograph's own comes back as its own result (`serving.scoring`); an exception here would be
that of the whole batch. Where BentoML is not as one would think:

* Its client closes all of its connections after 100 calls, with the calls that are on them: at 50
  callers a third of them got no answer. `runner_connection` turns that off.
* Its timeout keeps a timer of every request until it would have fired, and leaves the work running.
* Between its processes it carries pickles. They go through a Unix socket in a folder of this user
  alone; where BentoML would take TCP instead, the service does not start.

With that, 200 callers at a time were answered without a 503.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, cast

import bentoml
from bentoml.validators import ContentType
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.errors import BundleError, EngineError
from serving.draining import Work, finish_before_exit
from serving.framework import Configured, close_ports_of_others
from serving.scores import LOADING, READY, beside, trouble_of
from serving.scoring import Fault, Photograph, Result, Scoring
from serving.settings import Settings
from serving.sources import find_bundle

if TYPE_CHECKING:
    from prometheus_client import Histogram
    from starlette.applications import Starlette
    from starlette.types import ASGIApp

SIZES = (1, 2, 4, 8, 16, 32)
"""Upper bounds of what is counted of batches."""
ENVIRONMENT = [
    {"name": "MALLOC_MMAP_THRESHOLD_", "value": str(2**22)},
    {"name": "MALLOC_TRIM_THRESHOLD_", "value": str(2**24)},
]
"""Bytes from which glibc maps blocks one by one. Left alone it keeps up to 32 MB of each freed
picture in a heap that falls to pieces: 1.4 GB after some of 38 million pixels, 0.3 GB with this.
Usual photographs, of a million pixels at most, are read in the heap, whose free end is kept: given
back after each of them, it is taken anew for the next, page by page."""
PICKLE = "application/vnd.bentoml+pickle"
"""What BentoML's processes say to each other. Said here, since where nothing is said BentoML makes
the JSON schema of the results anew for every reply, to read from it what they are."""
NEVER = 10**9
"""Seconds, and milliseconds: some bound has to be given."""


class Untimed(Configured):
    """BentoML's service without its timeout."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        app = cast("Starlette", super().to_asgi(is_main))
        app.user_middleware = [
            middleware
            for middleware in app.user_middleware
            if getattr(middleware.cls, "__name__", "") != "TimeoutMiddleware"
        ]
        return app


@bentoml.service(
    name="dermaflux_scorer",
    service_class=Untimed,
    traffic={"timeout": NEVER},
    envs=ENVIRONMENT,
    runner_connection={"max_age": float(NEVER), "max_requests": NEVER},
)
class Scorer:
    """Classifies photographs of lesions, for the service `dermaflux` alone."""

    def __init__(self) -> None:
        self.settings = Settings.from_environment(os.environ)
        self.opening: Future[Scoring] = beside(lambda: opened(self.settings), "open classifier")
        self._followers, self._over = Work(), asyncio.Event()

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """End only after the process that asks, which finishes its own requests first."""
        close_ports_of_others()

        async def alone() -> None:
            try:
                await self._followers.over()
            finally:
                self._over.set()

        finish_before_exit(lambda: None, alone, seconds=self.settings.deadline_seconds + 30)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def score(
        self, photographs: list[Photograph]
    ) -> Annotated[list[Result], ContentType(PICKLE)]:
        """A result per photograph, in order."""
        trouble = trouble_of(self.opening)
        if trouble is not None:
            fault = Fault(kind="failed", message=trouble.words)
            return [Result(fault=fault) for _ in photographs]
        self._sizes.labels("score").observe(len(photographs))
        return await asyncio.to_thread(self.opening.result(), photographs)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def life(self) -> AsyncGenerator[str, None]:
        """A line whenever it stands otherwise: loading, ready with its batch and the engine's note,
        or why it cannot be used; then nothing, for as long as this process lives."""
        with self._followers:
            yield LOADING + "\n"
            opening = asyncio.wrap_future(self.opening)
            await asyncio.wait({opening})
            opening.exception()  # told below; asyncio would log that nobody asked for it
            trouble = trouble_of(self.opening)
            if trouble is None:
                scoring = opening.result()
                yield f"{READY} {scoring.batch} {scoring.note}".rstrip() + "\n"
            else:
                yield " ".join(trouble.words.splitlines()) + "\n"
            await self._over.wait()

    @cached_property
    def _sizes(self) -> Histogram:
        """What BentoML counts where it makes the batches, under its name: dashboards know it."""
        # Not before it is asked for: prometheus_client has to see the folder that BentoML names in
        # this process's environment.
        from prometheus_client import Histogram

        return Histogram(
            "bentoml_service_adaptive_batch_size",
            "Photographs that were scored together.",
            ["method_name"],
            buckets=SIZES,
        )

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """End the threads."""
        if self.opening.done() and self.opening.exception() is None:
            self.opening.result().close()


def opened(settings: Settings) -> Scoring:
    """The classifier of the settings' bundle, which has scored a picture already: engines put much
    off until then.

    Raises:
        BundleError: the bundle has no classifier, or it is left out, or cannot be opened.
        EngineError: an engine cannot be had, or failed.
    """
    if not settings.classifier:
        raise BundleError("it is left out by DERMAFLUX_CLASSIFIER=0")
    bundle = Bundle.open(find_bundle(settings))
    forced: Mapping[str, Any] = {
        "engine": settings.engine,
        "precision": settings.precision,
        "tier": settings.classifier_tier,
        "threads": settings.threads,
    }
    classifier = Classifier.open(bundle, **forced)
    _, height, width = classifier.spec.input_size
    for count in (1, bundle.limits.max_batch):
        classifier.classify([Image.new("RGB", (width, height))] * count)
    return Scoring(classifier, bundle.limits.max_batch)


def refuse_pickle_over_tcp() -> None:
    """Nothing, unless BentoML's processes would talk over TCP here.

    What comes over that connection is unpickled, which runs whatever it says: every user of the
    machine could have the service do it. BentoML takes TCP for these reasons, see
    `_bentoml_impl/server/serving.py`, `_get_server_socket`.

    Raises:
        EngineError: with the reason.
    """
    why = None
    if "BENTOML_NO_UDS" in os.environ:
        why = "BENTOML_NO_UDS is set; unset it"
    elif os.name == "nt" or "microsoft-standard" in platform.release():
        why = "BentoML takes TCP on Windows and WSL; run the service on Linux, in a container say"
    if why is not None:
        raise EngineError(
            "the processes of the service would talk over TCP, where BentoML carries pickles and "
            f"any user of this machine could send some: {why}"
        )
