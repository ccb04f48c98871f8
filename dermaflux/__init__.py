"""DermaFlux: generate and classify skin-lesion images. Research use only.

>>> from dermaflux import Pipeline
>>> pipeline = Pipeline.open("bundles/mini")
>>> (pixels,) = pipeline.generate([pipeline.request("dermoscopic image of a benign lesion")])
"""

from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier, Prediction
from dermaflux.errors import DermaFluxError
from dermaflux.pipeline import Pipeline, Progress, Request
from dermaflux.prompt import Lesion, caption

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Classifier",
    "DermaFluxError",
    "Lesion",
    "Pipeline",
    "Prediction",
    "Progress",
    "Request",
    "caption",
]
