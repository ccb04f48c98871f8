"""The watermark: invisible, found again after what pictures go through, and nowhere else."""

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dermaflux.marks import crops, watermark
from dermaflux.marks.spectrum import band, basis
from dermaflux.marks.symbols import Signs
from dermaflux.marks.watermark import ALARM, MIN_SIDE, Watermark, chance, psnr

KEY = b"a key of this test, 32 bytes long"
MARK = Watermark(KEY)
PAYLOAD = b"\x01\xfe\x80\x00"


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something like skin with a lesion: smooth, a dark blot, hairs, and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    blot = np.exp(-((((y - 0.5) / 0.22) ** 2 + ((x - 0.45) / 0.18) ** 2) ** 2))
    light = 190 + 25 * x - 110 * blot + 12 * np.sin(9 * x + 5 * y + seed)
    for _ in range(6):
        slope, start = rng.normal(0, 1), rng.random()
        light -= 60 * np.exp(-(((y - start - slope * (x - 0.5)) * height / 0.8) ** 2))
    grain = rng.normal(0, 3, (height, width))
    colour = (light + grain)[..., None] * np.array([1.0, 0.78, 0.68])
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def noisy(pixels: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 5, pixels.shape)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


HARM = {
    "nothing": lambda p: p,
    "JPEG 75": lambda p: jpeg(p, 75),
    "JPEG 50": lambda p: jpeg(p, 50),
    "half": lambda p: resized(p, p.shape[0] // 2, p.shape[1] // 2),
    "73 percent": lambda p: resized(p, int(p.shape[0] * 0.73), int(p.shape[1] * 0.73)),
    "double, JPEG 50": lambda p: jpeg(resized(p, p.shape[0] * 2, p.shape[1] * 2), 50),
    "another aspect": lambda p: resized(p, p.shape[0], p.shape[1] * 6 // 5),
    "noise": noisy,
    "mirrored": lambda p: np.ascontiguousarray(p[:, ::-1]),
    "grey": lambda p: np.asarray(Image.fromarray(p).convert("L").convert("RGB")),
}


@pytest.fixture(scope="module")
def marked():
    return {
        size: MARK.embed(picture(*size), PAYLOAD)
        for size in ((128, 128), (96, 160), (256, 256), (512, 512))
    }


@pytest.mark.parametrize("harm", HARM)
def test_it_is_found_after(marked, harm):
    for (height, _), one in marked.items():
        found = MARK.find(HARM[harm](one.pixels))
        assert found.present, (height, found)
        assert found.payload == (PAYLOAD if height >= 256 else None)


def test_it_cannot_be_seen(marked):
    for size, one in marked.items():
        assert one.sure
        assert one.psnr_db == psnr(picture(*size), one.pixels) >= 40
        assert np.abs(one.pixels.astype(int) - picture(*size)).max() <= 12


def test_the_same_pixels_get_the_same_mark():
    first, again = (MARK.embed(picture(128, 128), PAYLOAD) for _ in range(2))
    assert np.array_equal(first.pixels, again.pixels)


@pytest.mark.parametrize(
    ("turned", "view"),
    [
        (lambda p: p[::-1], "flipped upside down"),
        (lambda p: p[::-1, ::-1], "turned by 180 degrees"),
        (lambda p: p.transpose(1, 0, 2), "transposed"),
        (lambda p: np.rot90(p, -1), "turned by 90 degrees clockwise"),
        (lambda p: np.rot90(p), "turned by 90 degrees anticlockwise"),
        (
            lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
            "transposed along the other diagonal",
        ),
    ],
)
def test_how_a_picture_was_turned_is_told(marked, turned, view):
    found = MARK.find(np.ascontiguousarray(turned(marked[256, 256].pixels)))
    assert (found.view, found.payload) == (view, PAYLOAD)


def test_scores_of_views_are_those_of_the_picture_turned_back():
    seen = np.random.default_rng(5).normal(0, 1, (128, 128)).astype(np.float32)
    signs = Signs.of(KEY, 128)
    scores = watermark._scores(seen, signs)
    for name, view in watermark._VIEWS.items():
        assert scores[name] == pytest.approx(signs.score(watermark._undone(seen, *view)))


def test_another_key_finds_nothing_and_old_keys_are_looked_for(marked):
    pixels = marked[256, 256].pixels
    assert not Watermark(b"another key").find(pixels).present
    found = Watermark(b"another key", KEY).find(pixels)
    assert (found.present, found.key, found.payload) == (True, 1, PAYLOAD)


def test_unmarked_pictures_score_as_chance_does():
    """Over keys, scores of any picture have mean 0 and deviation 1, whatever is in it."""
    flat = np.full((128, 128, 3), 90, np.uint8)
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    for pixels in (picture(128, 128), flat, stripes, np.zeros_like(flat)):
        for key in range(20):
            found = Watermark(bytes([key])).find(pixels)
            assert found.p_value > 1e-4, (key, found)
    from dermaflux.marks.spectrum import coefficients, luminance

    seen = coefficients(luminance(picture(128, 128)), 64)
    scores = np.array([Signs.of(b"%d" % key, 64).score(seen) for key in range(400)])
    assert abs(scores.mean()) < 0.2
    assert 0.85 < scores.std() < 1.15


def test_the_bound_of_chance():
    assert chance(-3, 1) == chance(0, 5) == 1.0
    assert chance(6, 24) == pytest.approx(24 * np.exp(-18))
    assert chance(5.0, 24) > ALARM > chance(6.0, 24)


def test_small_pictures_are_left_alone():
    small = picture(MIN_SIDE - 1, 200)
    one = MARK.embed(small, PAYLOAD)
    assert (one.psnr_db, one.sure) == (None, False)
    assert np.array_equal(one.pixels, small)
    assert MARK.embed(picture(MIN_SIDE, 200), PAYLOAD).psnr_db is not None


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (16, 16), (17, 5)])
def test_any_size_can_be_looked_at(size):
    assert not MARK.find(np.zeros((*size, 3), np.uint8)).present


@pytest.mark.parametrize(("side", "part", "quality"), [(128, 0.8, 75), (256, 0.6, 50)])
def test_a_piece_is_found_with_its_place(marked, side, part, quality):
    length = int(side * part)
    top, left = 5, side - length
    piece = marked[side, side].pixels[top : top + length, left : left + length]
    crop = crops.find(MARK, jpeg(np.ascontiguousarray(piece), quality))
    assert crop is not None
    assert crop.found.present
    assert (crop.size, crop.top, crop.left) == ((side, side), top, left)
    if side == 256:
        assert crop.found.payload == PAYLOAD
    unmarked = picture(side, side)[top : top + length, left : left + length]
    nothing = crops.find(MARK, np.ascontiguousarray(unmarked))
    assert nothing is not None
    assert not nothing.found.present
    assert nothing.found.payload is None


def test_no_place_is_looked_for_where_none_can_be():
    assert crops.find(MARK, picture(63, 63)) is None
    assert crops.find(MARK, picture(128, 128), [(128, 128), (64, 64), (4000, 4000)]) is None


def test_payloads_come_back_and_damaged_ones_do_not():
    rng = np.random.default_rng(3)
    for bandwidth in (128, 256):
        signs = Signs.of(KEY, bandwidth)
        for _ in range(20):
            payload = rng.bytes(4)
            pattern = signs.pattern(payload)
            assert signs.read(pattern) == payload
            assert signs.read(pattern + rng.normal(0, 4, pattern.shape)) == payload
    read = [signs.read(rng.normal(0, 1, (256, 256))) for _ in range(50)]
    assert read == [None] * 50
    assert Signs.of(KEY, 64).read(Signs.of(KEY, 64).pattern(payload)) is None


def test_how_signs_are_drawn_never_changes():
    """Else no picture marked before would be recognised."""
    pattern = Signs.of(b"fixed", 128).pattern(b"\x00\x01\x02\x03").astype(np.int8)
    assert hashlib.sha256(pattern.tobytes()).hexdigest() == (
        "13e8fbab3dab9f550c2e31c655b21153bb4848fce6adc3b10aa8adde17d25b7e"
    )
    assert np.array_equal(pattern != 0, band(128))


def test_the_cosines_are_orthonormal():
    waves = basis(50, 50)
    assert np.allclose(waves @ waves.T, np.eye(50), atol=1e-5)
    assert basis(10, 64).shape == (10, 10)


def test_a_piece_of_one_colour_is_found_nowhere() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop = crops.find(MARK, np.full((128, 128, 3), 120, np.uint8))
    assert crop is not None
    assert not crop.found.present
