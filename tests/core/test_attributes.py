"""Lesions drawn by rule: what is measured of them is known beforehand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dermaflux import attributes
from dermaflux.attributes import dice, measure, segment
from dermaflux.prompt import COLORS, VOCABULARY

SKIN = (226, 188, 168)
BROWN = (92, 55, 40)
LIGHT = (172, 118, 82)
Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def ellipse(
    shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]
) -> Mask:
    """Of a picture of this shape; centre and radii are shares of its sides."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    y = (rows + 0.5) / shape[0] - centre[0]
    x = (columns + 0.5) / shape[1] - centre[1]
    return np.asarray((y / radii[0]) ** 2 + (x / radii[1]) ** 2 < 1)


def disc(side: int = 224, radius: float = 0.25, centre: tuple[float, float] = (0.5, 0.5)) -> Mask:
    return ellipse((side, side), centre, (radius, radius))


def paint(mask: Mask, colour: tuple[int, int, int] = BROWN, noise: float = 4.0) -> Image:
    pixels = np.where(mask[..., None], colour, SKIN).astype(np.float64)
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def test_a_disc() -> None:
    mask = disc(radius=0.25)
    found = measure(paint(mask), mask)
    assert found.found
    assert found.area == pytest.approx(np.pi / 16, rel=0.02)
    assert found.diameter == pytest.approx(0.5, abs=0.02)
    assert found.asymmetry < 0.02
    assert 0.95 < found.compactness < 1.15
    assert found.touch == 0
    assert (found.size, found.asymmetry_word, found.border_word) == (
        "medium", "symmetric", "regular",
    )  # fmt: skip
    assert found.colors == ("dark brown",)
    assert found.shares["dark brown"] == pytest.approx(1, abs=0.01)


def test_a_ragged_half_is_more_asymmetric_and_less_regular_than_a_disc() -> None:
    mask = disc(radius=0.3)
    angles = np.arctan2(*(np.mgrid[:224, :224] - 112))
    mask &= ~((np.sin(7 * angles) > 0.2) & (angles > 0))
    found = measure(paint(mask), mask)
    assert found.asymmetry_word == "asymmetric"
    assert found.border_word == "irregular"


@pytest.mark.parametrize(("radius", "word"), [(0.1, "small"), (0.3, "medium"), (0.45, "large")])
def test_size_words(radius: float, word: str) -> None:
    mask = disc(radius=radius)
    assert measure(paint(mask), mask).size == word


def test_a_lesion_cut_off_by_the_edge_has_no_words_for_its_shape() -> None:
    mask = disc(radius=0.4, centre=(0.5, 0.05))
    found = measure(paint(mask), mask)
    assert found.touch >= attributes.TOUCH
    assert (found.size, found.asymmetry_word, found.border_word) == ("edge", None, None)


def test_two_colours_share_the_lesion_in_the_vocabularys_order() -> None:
    mask = disc(radius=0.3)
    image = paint(mask)
    image[:, :112][mask[:, :112]] = LIGHT
    found = measure(image, mask)
    assert found.colors == ("light brown", "dark brown")
    assert found.shares["light brown"] == pytest.approx(0.5, abs=0.05)


def test_colour_is_relative_to_the_skin() -> None:
    mask = disc()
    dim = (paint(mask, LIGHT) * np.array([0.7, 0.75, 0.8])).astype(np.uint8)
    assert measure(dim, mask).colors == ("light brown",)


def test_a_lesion_of_the_skins_colour() -> None:
    mask = disc()
    found = measure(paint(mask, SKIN, noise=1), mask)
    assert found.colors == ("skin-coloured",)
    assert found.shares["skin-coloured"] == 1
    assert found.contrast < 3


def test_words_are_the_vocabularys() -> None:
    mask = disc()
    found = measure(paint(mask), mask)
    assert set(found.shares) == set(COLORS)
    assert found.size in VOCABULARY["size"]
    assert found.asymmetry_word in VOCABULARY["asymmetry"]
    assert found.border_word in VOCABULARY["border"]


def test_flips_and_scale_change_little() -> None:
    mask = ellipse((224, 224), (0.45, 0.55), (0.2, 0.3))
    upright = measure(paint(mask), mask)
    for other_mask in (mask[::-1], mask[:, ::-1], np.kron(mask, np.ones((2, 2), dtype=bool))):
        other = measure(paint(other_mask), other_mask)
        assert other.diameter == pytest.approx(upright.diameter, abs=0.01)
        assert other.compactness == pytest.approx(upright.compactness, abs=0.05)
        assert other.asymmetry == pytest.approx(upright.asymmetry, abs=0.02)
        assert other.colors == upright.colors


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (1024, 1024), (128, 192)])
def test_a_drawn_lesion_is_found_at_any_size(shape: tuple[int, int]) -> None:
    mask = ellipse(shape, (0.45, 0.52), (0.22, 0.2))
    found = segment(paint(mask))
    assert found.shape == shape
    assert found.dtype == np.bool_
    assert dice(found, mask) > 0.9


def black_corners(image: Image) -> Image:
    return np.where(disc(len(image), 0.52)[..., None], image, 3).astype(np.uint8)


def a_patch(image: Image) -> Image:
    return np.where(disc(len(image), 0.2, (0.5, 1.05))[..., None], (240, 190, 20), image).astype(
        np.uint8
    )


def hairs(image: Image) -> Image:
    hairy = image.copy()
    for start in (20, 60, 100, 140):
        rows = np.arange(len(image))
        hairy[rows, np.clip(start + rows // 3, 0, len(image) - 1)] = 30
    return hairy


@pytest.mark.parametrize("spoil", [black_corners, a_patch, hairs])
def test_what_stands_beside_a_lesion_is_no_part_of_it(spoil: object) -> None:
    assert callable(spoil)
    mask = disc(radius=0.18, centre=(0.5, 0.42))
    assert dice(segment(spoil(paint(mask))), mask) > 0.85


@pytest.mark.parametrize("spoil", [lambda image: image, black_corners, a_patch])
@pytest.mark.parametrize("noise", [0.0, 6.0])
def test_bare_skin_has_no_lesion(spoil: object, noise: float) -> None:
    assert callable(spoil)
    image = spoil(paint(np.zeros((128, 128), dtype=bool), noise=noise))
    assert not segment(image).any()
    assert measure(image) == attributes.NOTHING


def test_a_cast_of_light_is_no_lesion() -> None:
    skin = paint(np.zeros((128, 128), dtype=bool)) * np.linspace(0.8, 1, 128)[:, None, None]
    assert not segment(skin.astype(np.uint8)).any()


def test_black_and_white_pictures_do_not_break_it() -> None:
    for level in (0, 255):
        assert not measure(np.full((96, 96, 3), level, dtype=np.uint8)).found


def test_a_mask_that_covers_everything_is_measured() -> None:
    found = measure(paint(disc(128)), np.ones((128, 128), dtype=bool))
    assert found.size == "edge"
    assert np.isfinite(found.contrast)


def test_a_mask_of_one_pixel_is_measured() -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[64, 64] = True
    found = measure(paint(mask), mask)
    assert found.found
    assert found.asymmetry == 0


def test_dice() -> None:
    a, b, empty = disc(64, 0.3), disc(64, 0.2), np.zeros((64, 64), dtype=bool)
    assert dice(a, a) == 1
    assert dice(a, b) == dice(b, a)
    assert 0 < dice(a, b) < 1
    assert dice(a, empty) == 0
    assert dice(empty, empty) == 1


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="float64"):
        segment(np.zeros((64, 64, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(64, 64\)"):
        measure(np.zeros((64, 64), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        measure(np.zeros((64, 64, 3), dtype=np.uint8), np.zeros((32, 32), dtype=bool))


def test_the_service_starts_without_it() -> None:
    code = "import sys, dermaflux.pipeline, dermaflux.classifier; print('skimage' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
