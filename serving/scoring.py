"""Photographs in, one result each out: the work of the classifier's process, a batch at a time.

A batch holds photographs of different callers, so nothing that is wrong with one may touch its
neighbours: each has a result of its own, an answer or a fault, and where the engine fails on the
batch they are tried one by one. Files are read in a few threads beside each other, and no more
than that many pictures are unpacked at a time: of 40 million pixels each takes 120 MB, what is
kept of it for the classifier some 100 kB.

    >>> scoring = Scoring(Classifier.open("bundles/mini"))
    >>> scoring([Photograph(data=content)])
    [Result(answer=Answer(label='benign', ...), fault=None, ...)]
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel

from dermaflux.classifier import Classifier, Judged, Prepared
from dermaflux.engines.notes import note_of
from dermaflux.errors import ImageError
from dermaflux.hardware import usable_cores
from dermaflux.images import decode_upload
from dermaflux.saliency import overlay
from serving.schema import MAX_RATIO, MIN_SIDE

logger = logging.getLogger(__name__)

READERS = 4
"""Threads that unpack files at most; fewer on fewer cores."""

BATCH = 8
"""Photographs that are best scored together where nothing else is said; a bundle says it."""

Kind = Literal["invalid_image", "unsuitable_image", "no_saliency", "deadline", "failed"]


class Photograph(BaseModel):
    """One file to classify. `expires` is on the clock of `time.monotonic`, which all processes of
    one machine share: work whose caller has given up is not begun."""

    data: bytes
    saliency: bool = False
    expires: float = float("inf")
    request_id: str = ""


class Answer(BaseModel):
    """What `dermaflux.classifier.Prediction` says; label and probability only where accepted.

    `saliency` is a PNG file of `dermaflux.saliency.overlay`, where it was asked for.
    """

    label: str | None
    probability: float | None
    threshold: float
    decision: str
    accepted: bool
    reasons: list[tuple[str, str]]
    saliency: bytes | None = None


class Fault(BaseModel):
    """Why there is no answer: a word for programs, a sentence for people."""

    kind: Kind
    message: str


class Result(BaseModel):
    """One of answer and fault. `read_seconds` is the file's own time, `score_seconds` that of its
    whole batch."""

    answer: Answer | None = None
    fault: Fault | None = None
    read_seconds: float = 0.0
    score_seconds: float = 0.0


class _Read:
    """A photograph on its way through a batch."""

    def __init__(self, result: Result, prepared: Prepared | None, size: tuple[int, int]) -> None:
        self.result = result
        self.prepared = prepared
        self.size = size


class Scoring:
    """A classifier over batches of files, best of `batch`. One at a time is judged, which uses the
    machine best; the files of another call are read meanwhile."""

    def __init__(self, classifier: Classifier, batch: int = BATCH) -> None:
        self.classifier = classifier
        self.batch = batch
        self.note = note_of(classifier.engine)
        """What the engine says of how it was opened; empty where it says nothing."""
        self._turn = threading.Lock()
        self._readers = ThreadPoolExecutor(min(READERS, usable_cores()), "read_image")

    def __call__(self, photographs: Sequence[Photograph]) -> list[Result]:
        """A result per photograph, in order; raises nothing that has to do with one of them."""
        items = list(self._readers.map(self._read, photographs))
        asked = [
            (number, item.prepared)
            for number, item in enumerate(items)
            if item.prepared is not None
        ]
        with self._turn:
            begin = time.monotonic()
            judged = self._judge([prepared for _, prepared in asked])
            seconds = time.monotonic() - begin
        for (number, _), one in zip(asked, judged, strict=True):
            item, photograph = items[number], photographs[number]
            item.result.score_seconds = seconds
            if isinstance(one, Judged) and photograph.saliency and one.saliency is None:
                item.result.fault = Fault(
                    kind="no_saliency", message="this bundle's classifier has no saliency map"
                )
            elif isinstance(one, Judged):
                item.result.answer = self._answer(one, item.size, photograph)
            else:
                _log("a picture was not scored", photograph, one)
                item.result.fault = Fault(kind="failed", message="The classifier failed.")
        return [item.result for item in items]

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _judge(self, prepared: list[Prepared]) -> list[Judged | Exception]:
        """Together, and where that fails one by one, so that it fails only whom it must."""
        try:
            return list(self.classifier.judge(prepared))
        # Engines raise what they please, out of memory among it.
        except Exception as error:
            if len(prepared) == 1:
                return [error]
            logger.warning("a batch of %d failed; trying one by one", len(prepared))
            return [found for one in prepared for found in self._judge([one])]

    def _read(self, photograph: Photograph) -> _Read:
        """Runs in a thread of its own; holds the unpacked picture no longer than it lasts."""
        begin = time.monotonic()
        result, prepared, size = Result(), None, (0, 0)
        try:
            if begin >= photograph.expires:
                result.fault = Fault(kind="deadline", message="Its turn came too late.")
            else:
                image = decode_upload(photograph.data)
                size = image.size
                result.fault = unsuitable(size)
                if result.fault is None:
                    prepared = self.classifier.prepare(image, saliency=photograph.saliency)
        except ImageError as error:
            result.fault = Fault(kind="invalid_image", message=str(error))
        except Exception as error:
            _log("a picture was not prepared", photograph, error)
            result.fault = Fault(kind="failed", message="The picture could not be prepared.")
        result.read_seconds = time.monotonic() - begin
        return _Read(result, prepared, size)

    def _answer(self, judged: Judged, size: tuple[int, int], photograph: Photograph) -> Answer:
        said = judged.prediction
        png = None
        if photograph.saliency and said.accepted and judged.saliency is not None:
            stream = io.BytesIO()
            overlay(judged.saliency, size, self.classifier.spec).save(stream, "PNG")
            png = stream.getvalue()
        return Answer(
            label=said.label if said.accepted else None,
            probability=said.probability if said.accepted else None,
            threshold=said.threshold,
            decision=said.decision,
            accepted=said.accepted,
            reasons=[(one.code, one.text) for one in said.reasons],
            saliency=png,
        )


def unsuitable(size: tuple[int, int]) -> Fault | None:
    """Why an answer about a picture of this size would mean nothing; None where it would."""
    told = f"the picture has {size[0]} x {size[1]} pixels"
    if min(size) < MIN_SIDE:
        return Fault(
            kind="unsuitable_image",
            message=f"{told}; at least {MIN_SIDE} a side are needed. Send the photograph as the "
            "camera made it, not a thumbnail",
        )
    if max(size) > MAX_RATIO * min(size):
        return Fault(
            kind="unsuitable_image",
            message=f"{told}; only the square in its middle would be looked at. Crop it to the "
            f"lesion, at most {MAX_RATIO} times as long as wide",
        )
    return None


def _log(words: str, photograph: Photograph, error: Exception) -> None:
    logger.error(words, exc_info=error, extra={"request": photograph.request_id})
