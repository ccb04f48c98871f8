"""A real picture as another clinic might send it: framed, turned, resized and compressed otherwise.

Collections were prepared once, by one program, so statistics of their files hold traces of it (how
sharp Lanczos leaves an edge, which size there is). A gate fitted to those alone would refuse good
pictures of anybody else. So it is fitted to pictures prepared anew, each in its own way.

    >>> prepared(picture, np.random.default_rng(0)).size
    (187, 187)
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance

SIDES: Final = (128, 512)
"""Pixels of the prepared picture; its sharpness is that of the smaller of this and the original."""
_FILTERS: Final = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
)


def prepared(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """An RGB picture anew: a window of 0.8 to 1 of it whose sides are stretched by up to 4 : 3 (as
    between cameras and squares), turned and flipped, light and colours changed by up to 10 %,
    resized by one of four filters, and a JPEG of quality 60 to 95."""
    share = random.uniform(0.8, 1.0)
    narrow = random.uniform(0.75, 1.0)
    sides = np.array(picture.size) * share
    sides[random.integers(2)] *= narrow
    left, top = random.uniform(0, 1, 2) * (picture.size - sides)
    side = round(float(np.exp(random.uniform(*np.log(SIDES)))))
    resample = _FILTERS[random.integers(len(_FILTERS))]
    box = (left, top, left + sides[0], top + sides[1])
    found = picture.convert("RGB").resize((side, side), resample, box)
    found = found.rotate(90 * int(random.integers(4)))
    if random.random() < 0.5:
        found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        found = kind(found).enhance(float(random.uniform(0.9, 1.1)))
    return compressed(found, random)


def compressed(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """A picture as a JPEG of quality 60 to 95 has it, as nearly all that are sent are."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(random.integers(60, 96)))
    with Image.open(stream) as again:
        return again.convert("RGB")
