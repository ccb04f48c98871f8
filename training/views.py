"""What a batch shows: random views of pictures and masks.

A view is one affine grid and one colour matrix a picture, then blur, a square that is painted over
and dark corners for some. All that is random is drawn first, on the CPU and for a whole batch, so
that processes which share a batch show what one alone would show.

    >>> shown = views(targets, rows, recipe, generator)
    >>> augment(images[rows], targets.mask[rows], shown, 128)[0].shape
    torch.Size([64, 3, 128, 128])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.recipe import Recipe
from training.targets import Targets


@dataclass(frozen=True)
class Views:
    """How each picture of a batch is shown.

    Attributes:
        theta: float32 [N, 2, 3], for `affine_grid`. light: float32 [N, 3, 4], colour maps.
        blur: [N], sigma as a share of the side, 0 for none. cut: [N, 3], the centre (x, y, -1..1)
            and half side of a square that is painted over; half side 0 for none.
        vignette: [N], how much light the corners lose, 0..1.
    """

    theta: Tensor
    light: Tensor
    blur: Tensor
    cut: Tensor
    vignette: Tensor

    def part(self, place: slice, device: torch.device) -> Views:
        """Those of some pictures, on a device."""
        return Views(*(getattr(self, one.name)[place].to(device) for one in fields(self)))


def views(targets: Targets, rows: Tensor, recipe: Recipe, random: Generator | None = None) -> Views:
    """Random views of `rows`, as `recipe.augment` says; all on the CPU."""
    count = len(rows)
    match recipe.augment:
        case "dermoscopy":
            theta, light = _turned(targets, rows, recipe.zoom, random), lights(count, random)
        case "classic":
            theta, light = _classic(count, random), lights(count, random, strength=0.5)
        case _:
            theta = recipe.crop_pct * torch.eye(2, 3).repeat(count, 1, 1)
            light = torch.eye(3, 4).repeat(count, 1, 1)
    blur, cut, vignette = torch.zeros(count), torch.zeros(count, 3), torch.zeros(count)
    if recipe.blur:
        sigma = 0.003 + 0.012 * torch.rand(count, generator=random)  # 0.7 to 3.4 of 224 pixels
        blur = torch.where(torch.rand(count, generator=random) < recipe.blur, sigma, blur)
    if recipe.cutout:
        half = 0.1 + 0.15 * torch.rand(count, 1, generator=random)
        centre = 2 * torch.rand(count, 2, generator=random) - 1
        chosen = torch.rand(count, 1, generator=random) < recipe.cutout
        cut = torch.where(chosen, torch.cat([centre, half], 1), cut)
    if recipe.vignette:
        strength = 0.3 + 0.7 * torch.rand(count, generator=random)
        chosen = torch.rand(count, generator=random) < recipe.vignette
        vignette = torch.where(chosen, strength, vignette)
    return Views(theta, light, blur, cut, vignette)


def _turned(targets: Targets, rows: Tensor, zoom: float, random: Generator | None) -> Tensor:
    """Any turn and flip, crops of 40 to 100 % of the picture, often to the lesion: [N, 2, 3]."""
    count = len(rows)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    side = (0.4 + 0.6 * rand(count)).sqrt()
    centre = (2 * rand(count, 2) - 1) * (1 - side)[:, None]
    zoomed = targets.masked[rows] & (rand(count) < zoom)
    box = targets.box[rows]
    side = torch.where(zoomed, (box[:, 2] * (1.0 + 0.8 * rand(count))).clamp(0.2, 1.0), side)
    centre = torch.where(
        zoomed[:, None], box[:, :2] + 0.2 * (rand(count, 2) - 0.5) * side[:, None], centre
    )
    quarter = torch.randint(4, (count,), generator=random) * (math.pi / 2)
    angle = torch.where(rand(count) < 0.5, rand(count) * 2 * math.pi, quarter)
    stretch = torch.exp(0.12 * (2 * rand(count) - 1))
    flip = torch.where(rand(count) < 0.5, -1.0, 1.0)
    scale = torch.stack([side * stretch * flip, side / stretch], 1)
    return _affine(angle, scale, centre)


def _classic(count: int, random: Generator | None) -> Tensor:
    """Flips, turns by up to 15 degrees, and crops of 64 to 100 % of the picture: [N, 2, 3]."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    side = 0.8 + 0.2 * rand(count)
    centre = (2 * rand(count, 2) - 1) * (1 - side)[:, None]
    angle = (2 * rand(count) - 1) * (math.pi / 12)
    flips = torch.where(rand(count, 2) < 0.5, -1.0, 1.0)
    return _affine(angle, side[:, None] * flips, centre)


def _affine(angle: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    return torch.cat([turn @ torch.diag_embed(scale), centre[:, :, None]], dim=2)


def lights(count: int, random: Generator | None = None, strength: float = 1.0) -> Tensor:
    """Random colour maps [N, 3, 4]: white balance, brightness, contrast and saturation."""

    def rand() -> Tensor:
        return strength * (2 * torch.rand(count, 1, 1, generator=random) - 1)

    common = 0.12 * torch.randn(count, 1, 1, generator=random)
    gain = torch.exp(strength * (common + 0.06 * torch.randn(count, 3, 1, generator=random)))
    contrast = 1 + 0.25 * rand()
    saturation = 1 + 0.3 * rand()
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    matrix = gain * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    return torch.cat([matrix, (0.6 * (1 - contrast)).expand(-1, 3, 1)], dim=2)


def augment(images: Tensor, masks: Tensor, seen: Views, size: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S', S'] and [N, S', S'] -> pictures [N, 3, size, size] in 0..1, and masks."""
    grid = F.affine_grid(seen.theta, [len(images), 4, size, size], align_corners=False)
    both = torch.cat([images, masks[:, None]], dim=1).float() / 255
    shown = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    pixels = torch.einsum("nij,njhw->nihw", seen.light[:, :, :3], shown[:, :3])
    pixels = (pixels + seen.light[:, :, 3:, None]).clamp(0, 1)
    return disturbed(pixels, seen), shown[:, 3]


def disturbed(pixels: Tensor, seen: Views) -> Tensor:
    """[N, 3, S, S] in 0..1, blurred, cut and darkened where `seen` says so."""
    size = pixels.shape[-1]
    if (blurred := seen.blur > 0).any():
        pixels = pixels.clone()
        pixels[blurred] = _blurred(pixels[blurred], seen.blur[blurred] * size)
    if not seen.cut[:, 2].any() and not seen.vignette.any():
        return pixels
    line = (2 * torch.arange(size, device=pixels.device) + 1) / size - 1
    x, y = line[None, None, :], line[None, :, None]
    # Dermatoscopes darken, if at all, beyond the circle that touches the edges.
    far = ((x.square() + y.square()).sqrt() - 0.8).clamp(0, 0.4) / 0.4
    pixels = pixels * (1 - seen.vignette[:, None, None] * far)[:, None]
    centre_x, centre_y, half = (value[:, None, None] for value in seen.cut.T)
    inside = torch.maximum((x - centre_x).abs(), (y - centre_y).abs()) < half
    return torch.where(inside[:, None], pixels.mean((2, 3), keepdim=True), pixels)


def _blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """[N, 3, S, S] with a Gaussian of `sigma` pixels, [N]: one row of it, then the other."""
    count, channels, size, _ = pixels.shape
    reach = min(max(1, math.ceil(3 * float(sigma.max()))), size - 1)
    steps = torch.arange(-reach, reach + 1, device=pixels.device)
    kernel = torch.exp(-0.5 * (steps / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(pixels.reshape(1, -1, size, size), (reach,) * 4, mode="reflect")
    groups = count * channels
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=groups)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=groups)
    return flat.reshape(pixels.shape)
