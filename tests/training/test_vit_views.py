"""What a batch shows: kinds of augmentation, and what is done to some of the pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training import draws, views
from training.recipe import Recipe
from training.targets import Targets

SIZE = 64
RECIPE = Recipe(size=SIZE, margin=0)


def _targets(count: int) -> Targets:
    return Targets(
        label=torch.zeros(count, dtype=torch.int64), diagnosis=torch.full((count,), -1),
        structures=torch.full((count, 5), -1.0), mask=torch.zeros(count, SIZE, SIZE).byte(),
        masked=torch.zeros(count, dtype=torch.bool), box=torch.tensor([[0.0, 0, 1]] * count),
    )  # fmt: skip


def _seen(recipe: Recipe, images: Tensor, seed: int = 0) -> tuple[views.Views, Tensor]:
    known, rows = _targets(len(images)), torch.arange(len(images))
    shown = views.views(known, rows, recipe, draws.random(seed))
    return shown, views.augment(images, known.mask, shown, SIZE)[0]


def _images(count: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)


def test_none_is_the_picture_itself() -> None:
    images = _images(4)
    _, seen = _seen(replace(RECIPE, augment="none"), images)
    assert torch.allclose(seen, images.float() / 255, atol=1e-5)


def test_none_shows_what_evaluation_shows() -> None:
    """Of a model that is given the middle of a picture."""
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    images[..., 8:56, 8:56] = 255
    _, seen = _seen(replace(RECIPE, augment="none", crop_pct=0.75), images)
    assert seen.min() > 0.4  # the dark rim is cut off, but for half of its last pixel


@pytest.mark.parametrize("kind", ["classic", "dermoscopy"])
def test_views_follow_from_the_seed(kind: str) -> None:
    recipe, images = replace(RECIPE, augment=kind, blur=0.5, cutout=0.5, vignette=0.5), _images(8)
    first, again, other = (_seen(recipe, images, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() < first.max() <= 1


def test_classic_turns_less_than_dermoscopy() -> None:
    count = 500
    known, rows = _targets(count), torch.arange(count)
    angles = {}
    for kind in ("classic", "dermoscopy"):
        theta = views.views(known, rows, replace(RECIPE, augment=kind), draws.random(0)).theta
        # The first column of turn and scale, whatever is flipped.
        angles[kind] = torch.atan2(theta[:, 1, 0].abs(), theta[:, 0, 0].abs()).rad2deg()
        assert (torch.linalg.det(theta[:, :, :2]) < 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert angles["classic"].max() <= 15.01
    assert (angles["dermoscopy"] > 30).float().mean() > 0.3


def test_parts_of_a_batch_are_seen_as_the_whole_is() -> None:
    recipe = replace(RECIPE, blur=0.5, cutout=0.5, vignette=0.5)
    images, known = _images(8), _targets(8)
    shown, whole = _seen(recipe, images)
    for place in (slice(0, 4), slice(4, 8)):
        part, _ = views.augment(
            images[place], known.mask[place], shown.part(place, torch.device("cpu")), SIZE
        )
        assert torch.allclose(part, whole[place], atol=1e-6)


def _disturbed(pixels: Tensor, **changes: Tensor) -> Tensor:
    count = len(pixels)
    blank = views.Views(
        torch.eye(2, 3).repeat(count, 1, 1), torch.eye(3, 4).repeat(count, 1, 1),
        torch.zeros(count), torch.zeros(count, 3), torch.zeros(count),
    )  # fmt: skip
    return views.disturbed(pixels, replace(blank, **changes))


def test_blur_smooths_those_that_it_is_for() -> None:
    pixels = _images(3).float() / 255
    blurred = _disturbed(pixels, blur=torch.tensor([0.0, 0.01, 0.03]))
    assert torch.equal(blurred[0], pixels[0])
    rough = [float(one.diff(dim=-1).abs().mean()) for one in blurred]
    assert rough[0] > 2 * rough[1] > 4 * rough[2]
    assert torch.allclose(blurred.mean((1, 2, 3)), pixels.mean((1, 2, 3)), atol=0.01)
    flat = torch.full((1, 3, SIZE, SIZE), 0.3)
    assert torch.allclose(_disturbed(flat, blur=torch.tensor([0.02])), flat, atol=1e-6)


def test_a_cut_square_has_the_mean_colour() -> None:
    pixels = _images(2).float() / 255
    cut = _disturbed(pixels, cut=torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0.25]]))
    assert torch.equal(cut[0], pixels[0])
    square = cut[1, :, 8:24, 40:56]  # x to the right, y downwards
    assert torch.allclose(square, pixels[1].mean((1, 2))[:, None, None].expand_as(square))
    assert int((cut[1] != pixels[1]).any(0).sum()) == 16 * 16


def test_a_vignette_darkens_the_corners_alone() -> None:
    pixels = torch.full((2, 3, SIZE, SIZE), 0.8)
    dark = _disturbed(pixels, vignette=torch.tensor([0.0, 1.0]))
    assert torch.equal(dark[0], pixels[0])
    assert torch.equal(dark[1, :, 16:48, 16:48], pixels[1, :, 16:48, 16:48])
    assert dark[1, :, 0, 0].max() < 0.01
