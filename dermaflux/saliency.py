"""A saliency over the picture that it is of: where a vision transformer looked.

The classifier's graph gives one number per patch of its input: attention rolled out over the
blocks (Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020), the largest 1. Here
it is laid over the picture: resized to the part that the classifier saw, clear elsewhere. It tells
where the model looked, not why, and explains nothing clinically: a map may sit on the lesion and
the answer be wrong.

    >>> (judged,) = classifier.judge([classifier.prepare(picture, saliency=True)])
    >>> overlay(judged.saliency, picture.size, classifier.spec).save("where.png")
"""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

from dermaflux.classifier import frame
from dermaflux.flow import Floats
from dermaflux.manifest import ClassifierSpec

LONGEST: Final = 512
"""Pixels of an overlay's longer side at most: a map of some 14 x 14 patches has no more to show."""


def overlay(
    saliency: Floats, size: tuple[int, int], spec: ClassifierSpec, longest: int = LONGEST
) -> Image.Image:
    """A saliency [rows, columns], 0 to 1, as a picture of the shape of the one with `size`.

    The picture's mode is LA: grey 0 to 255 is the saliency, alpha is 255 where the classifier
    looked at all and 0 around it. Its longer side is that of the picture, or `longest` pixels.
    """
    scale = min(1.0, longest / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    left, top, right, bottom = seen(size, spec)
    corner = (min(round(left * scale), width - 1), min(round(top * scale), height - 1))
    inner = (
        max(1, min(round(right * scale), width) - corner[0]),
        max(1, min(round(bottom * scale), height) - corner[1]),
    )
    grey = np.rint(np.clip(saliency, 0.0, 1.0) * 255).astype(np.uint8)
    map_ = Image.fromarray(grey).resize(inner, Image.Resampling.BICUBIC)
    canvas = Image.new("LA", (width, height), (0, 0))
    canvas.paste(Image.merge("LA", (map_, Image.new("L", inner, 255))), corner)
    return canvas


def seen(size: tuple[int, int], spec: ClassifierSpec) -> tuple[float, float, float, float]:
    """The part of a picture that the classifier's input shows: left, top, right and bottom, in the
    picture's pixels."""
    (width, height), (left, top) = frame(size, spec)
    _, rows, columns = spec.input_size
    across, down = size[0] / width, size[1] / height
    return left * across, top * down, (left + columns) * across, (top + rows) * down
