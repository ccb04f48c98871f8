"""PNG files: every pixel and text comes back, from a reader that is not ours."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from dermaflux import png
from dermaflux.flow import noise


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(64) * 2, np.arange(48) * 3)[..., None] + [0, 40, 80]
    grain = smooth + 9 * noise(1, smooth.shape)
    return [
        random.integers(0, 256, (33, 21, 3), dtype=np.uint8),
        random.integers(0, 2, (5, 7, 3), dtype=np.uint8) * np.uint8(255),
        np.full((16, 16, 3), 200, np.uint8),
        smooth.clip(0, 255).astype(np.uint8),
        grain.clip(0, 255).astype(np.uint8),
        random.integers(0, 256, (3, 1, 3), dtype=np.uint8),
        random.integers(0, 256, (1, 300, 3), dtype=np.uint8),
    ]


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.verify()
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("strip", [1, 200, 2**17])
@pytest.mark.parametrize("number", range(len(pictures())))
def test_every_pixel_comes_back(monkeypatch, number, strip):
    monkeypatch.setattr(png, "_STRIP", strip)
    pixels = pictures()[number]
    picture = opened(png.write(pixels))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    assert np.array_equal(np.asarray(picture), pixels)


def test_rows_that_do_not_lie_side_by_side_are_read_as_they_are():
    pixels = pictures()[0]
    for view in (pixels[::-1, ::2], pixels.transpose(1, 0, 2)):
        assert np.array_equal(np.asarray(opened(png.write(view))), view)


def test_the_strip_changes_nothing(monkeypatch):
    whole = png.write(pictures()[0])
    monkeypatch.setattr(png, "_STRIP", 100)
    assert png.write(pictures()[0]) == whole


def test_texts_come_back_in_order():
    texts = [("b", "zwölf µm, 色"), ("a", ""), ("XML:com.adobe.xmp", "<x/>\n")]
    picture = opened(png.write(pictures()[2], texts))
    assert list(picture.text.items()) == texts


def test_neighbours_are_chosen_as_the_standard_says():
    values = np.array([0, 1, 2, 100, 127, 128, 254, 255], np.uint8)
    left, above, corner = np.array(list(itertools.product(values, repeat=3)), np.uint8).T
    want = []
    for a, b, c in zip(left.tolist(), above.tolist(), corner.tolist(), strict=True):
        guess = a + b - c
        want.append(min((a, b, c), key=lambda one: abs(guess - one)))
    assert png._paeth(left, above, corner).tolist() == want


def test_a_picture_with_grain_is_no_larger_than_pillows():
    pixels = pictures()[4]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    assert len(png.write(pixels)) <= 1.02 * len(stream.getvalue())
