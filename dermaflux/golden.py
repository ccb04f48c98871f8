"""The golden image: made at export, made again here, compared. Engines that are wrong show here.

It is about engines, so every step of it is computed, whatever the tier.

>>> check(bundle, Pipeline.open(bundle))
Comparison(psnr_db=99.0, tolerance_db=30.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.decode import Pixels
from dermaflux.errors import BundleError, RequestError
from dermaflux.pipeline import Pipeline

EQUAL_DB: Final = 99.0
"""Stands for the endless PSNR of equal images, as in `bundle.json`."""


@dataclass(frozen=True)
class Comparison:
    """How near the image is to the stored one, in dB, and how near it has to be."""

    psnr_db: float
    tolerance_db: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough."""
        return self.psnr_db >= self.tolerance_db


def check(bundle: Bundle, pipeline: Pipeline) -> Comparison | None:
    """Make the golden image and compare it with the bundle's; None where the bundle has none.

    Raises:
        BundleError: its request or its image cannot be used.
        EngineError: an engine failed.
    """
    golden = bundle.golden
    if golden is None:
        return None
    try:
        with Image.open(bundle.file(golden.image)) as picture:
            stored = np.asarray(picture.convert("RGB"))
        request = pipeline.request(**golden.request)
    except (OSError, TypeError, RequestError) as error:
        raise BundleError(
            f"the golden image of {bundle.path} cannot be made again: {error}; export the bundle "
            "again"
        ) from error
    (made,) = pipeline.computing().generate([request])
    if made.shape != stored.shape:
        raise BundleError(
            f"{golden.image} has the shape {stored.shape}, its request makes {made.shape}; export "
            "the bundle again"
        )
    return Comparison(psnr(made, stored), golden.tolerance_db)


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB, `EQUAL_DB` at most."""
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return EQUAL_DB if error == 0 else min(EQUAL_DB, float(10 * np.log10(255**2 / error)))
