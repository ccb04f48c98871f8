"""`POST /v1/classify`: one photograph in, a calibrated probability and a decision out.

Reading the file is done in the thread as well: a large JPEG takes longer than the network does.
"""

from __future__ import annotations

import time
from typing import Literal, cast

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dermaflux.classifier import Classifier, Prediction
from dermaflux.images import decode_upload
from serving.body import read_image
from serving.metrics import Metrics
from serving.replies import Refusal
from serving.schema import MAX_RATIO, MIN_SIDE, Classification, Refused
from serving.settings import Settings
from serving.worker import Job, Worker


class Classifying:
    """The route over one classifier, or over none where the bundle has none."""

    def __init__(
        self,
        classifier: Classifier | None,
        bundle: str,
        worker: Worker,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._classifier = classifier
        self._bundle = bundle
        self._worker = worker
        self._metrics = metrics
        self._settings = settings

    async def photograph(self, request: Request) -> Response:
        """The answer as JSON, see `serving.schema.Classification`."""
        if self._classifier is None:
            raise Refusal(
                404, "no_classifier", "This bundle has no classifier; serve one that has."
            )
        classifier = self._classifier
        data = await read_image(
            request, self._settings.max_upload_bytes, self._settings.deadline_seconds
        )
        job = self._worker.submit(lambda job: self._score(classifier, data, job))
        prediction = await job.result()
        self._metrics.decision(prediction.decision)
        answer = Classification(
            label=cast(Literal["benign", "malignant"], prediction.label),
            probability=prediction.probability,
            threshold=prediction.threshold,
            abstain=classifier.spec.abstain,
            decision=cast(Literal["benign", "malignant", "abstain"], prediction.decision),
            accepted=prediction.accepted,
            reasons=[Refused(code=one.code, text=one.text) for one in prediction.reasons],
            bundle=self._bundle,
        )
        return JSONResponse(answer.model_dump(), headers={"Cache-Control": "no-store"})

    def _score(self, classifier: Classifier, data: bytes, job: Job[Prediction]) -> Prediction:
        """The work itself; runs in the worker's thread."""
        self._metrics.took("wait", time.monotonic() - job.created)
        with self._metrics.timed("read_image"):
            image = suitable(decode_upload(data))
        with self._metrics.timed("classify"):
            (prediction,) = classifier.classify([image])
        return prediction


def suitable(image: Image.Image) -> Image.Image:
    """The picture, if an answer about it would mean something.

    Raises:
        Refusal: 422, a side is under `MIN_SIDE` pixels, or it is longer than `MAX_RATIO` to 1.
    """
    size = f"image: the picture has {image.width} x {image.height} pixels"
    if min(image.size) < MIN_SIDE:
        raise Refusal(
            422,
            "unsuitable_image",
            f"{size}; at least {MIN_SIDE} a side are needed. Send the photograph as the camera "
            "made it, not a thumbnail",
            field="image",
        )
    if max(image.size) > MAX_RATIO * min(image.size):
        raise Refusal(
            422,
            "unsuitable_image",
            f"{size}; only the square in its middle would be looked at. Crop it to the lesion, at "
            f"most {MAX_RATIO} times as long as wide",
            field="image",
        )
    return image
