"""Whether the service may answer: not before every engine has run and the golden image is right.

An engine can load and still be wrong: a driver that rounds otherwise, a damaged cache, a precision
that this GPU only pretends to have. So the image that the export stored is drawn again at start and
compared; that run also pays for what engines put off until their first run.

Until then, and for good where it does not match, `/readyz` and the routes that draw or classify
answer 503 with the reason; probes of life, the page, the model card and metrics go on. A process
that ended instead would be started again and again, and would take its reason with it: this one
gets no requests from a load balancer, refuses those that come past it, holds up a rolling update
while the old one serves, and can be asked why. `DERMAFLUX_GOLDEN=0` leaves the comparison out.
Engines are loaded in a thread, so that probes are answered meanwhile.

    >>> readiness = Readiness()
    >>> readiness.begin(lambda: prove(bundle, pipeline, compare=True))
    >>> readiness.require()         # raises Refusal until it is proved
    >>> readiness.leave()           # and from here on again: the process is about to end
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from dermaflux import golden
from dermaflux.bundle import Bundle
from dermaflux.errors import DermaFluxError
from dermaflux.pipeline import Pipeline
from serving.card import GoldenCard
from serving.replies import Refusal

logger = logging.getLogger(__name__)

COME_BACK_SECONDS = 2
"""`Retry-After` while the engines are proved; the embedded default takes under a second."""


class Readiness:
    """Not ready until what `begin` was given has found nothing wrong, in a thread of its own."""

    def __init__(self) -> None:
        self.golden = GoldenCard(result="pending", words="The engines are being loaded and proved.")
        self.ready = False
        self.leaving = False

    def begin(self, prove: Callable[[], GoldenCard]) -> None:
        """Call `prove` once, beside everything else; its answer decides."""
        # A daemon: minutes of loading must not keep the process from ending.
        threading.Thread(target=self._settle, args=(prove,), name="prove", daemon=True).start()

    def leave(self) -> None:
        """Take nothing more: the process ends once what it has begun is finished."""
        self.leaving = True

    def require(self) -> None:
        """Nothing, once the service is ready.

        Raises:
            Refusal: 503, with the reason; with `Retry-After` while waiting helps.
        """
        if self.leaving:
            words = "This process is about to end; another one takes requests, or will soon."
            raise Refusal(503, "not_ready", words, headers={"Retry-After": str(COME_BACK_SECONDS)})
        if self.ready:
            return
        told = self.golden
        wait = {"Retry-After": str(COME_BACK_SECONDS)} if told.result == "pending" else {}
        raise Refusal(503, "not_ready", told.words, headers=wait)

    def _settle(self, prove: Callable[[], GoldenCard]) -> None:
        begin = time.monotonic()
        try:
            found = prove()
        except DermaFluxError as error:
            found = GoldenCard(result="failed", words=f"The engines cannot be used: {error}")
        except Exception:
            logger.exception("the engines failed when they were first run")
            words = "The engines failed when they were first run; the log of the service has it."
            found = GoldenCard(result="failed", words=words)
        self.golden = found
        self.ready = found.result != "failed"
        level = logging.INFO if found.result == "passed" else logging.WARNING
        if not self.ready:
            level = logging.ERROR
        state = "ready" if self.ready else "NOT READY, /readyz stays 503"
        logger.log(level, "%s after %.1f s: %s", state, time.monotonic() - begin, found.words)


def prove(bundle: Bundle, pipeline: Pipeline, *, compare: bool) -> GoldenCard:
    """Run every engine of the generator once; with `compare`, draw the bundle's golden image and
    judge it.

    Raises:
        BundleError: the golden image cannot be drawn from what the bundle says of it.
        EngineError: an engine failed.
    """
    if not compare or bundle.golden is None:
        pipeline.generate([pipeline.request("a lesion", seed=0, steps=1)])
    if not compare:
        return GoldenCard(
            result="skipped",
            words="Warning: DERMAFLUX_GOLDEN=0, so nobody compared what is drawn here with what "
            "the export drew.",
        )
    found = golden.check(bundle, pipeline)
    if found is None:
        return GoldenCard(
            result="absent",
            words="Warning: the bundle has no golden image, so what is drawn here was not compared "
            "with what the export drew; export it again.",
        )
    figures = f"{found.psnr_db:.1f} dB PSNR, needed are at least {found.tolerance_db:g} dB"
    return GoldenCard(
        result="passed" if found.passed else "failed",
        psnr_db=round(found.psnr_db, 1),
        tolerance_db=found.tolerance_db,
        words=f"The golden image came out as exported: {figures}."
        if found.passed
        else f"The golden image came out wrong: {figures}. Look with: python -m dermaflux doctor "
        f"BUNDLE --golden, or try another DERMAFLUX_ENGINE or DERMAFLUX_PRECISION.",
    )
