"""A lesion measured in its picture: where it is, how large, how asymmetric, in which colours.

One measure for captions, reports and the quality gate of batches. Real pictures come with masks,
generated ones do not, so this module finds the lesion too. All of it is measured in pixels: it is
said of the picture, never of a patient, and there are no millimetres.

`segment` is two small logistic models over colour differences to the skin at the border of the
picture. The second sees the mean colours that the first one found. Their weights come from
`python -m training.measure --split train --fit` on ISIC 2017 (CC-0); without `--fit` the same
command says how well they do on pictures they never saw.

    >>> found = measure(pixels)
    >>> found.size, found.colors
    ('medium', ('light brown', 'dark brown'))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import color
from skimage.measure import perimeter, regionprops

from dermaflux.prompt import ASYMMETRIES, BORDERS, COLORS

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Quantiles of ISIC 2017's training masks, of the lesions that the edge does not cut off: 40 % and
# 75 % of asymmetry and compactness, 33 % and 75 % of the diameter. The captions of the training
# data were worded by the same numbers.
ASYMMETRY_STEPS: Final = (0.05777460770328103, 0.08983523932827366)
BORDER_STEPS: Final = (1.1996577175443344, 1.362403752407218)
SIZE_STEPS: Final = (0.4141079184974664, 0.7965339007972474)
TOUCH: Final = 0.15
"""Share of the perimeter at the picture's edge from which a lesion counts as cut off by it."""
NAMED: Final = 0.08
"""Share of the pixels that are not skin from which a colour is named."""
NAMED_REDDISH: Final = 0.5
"""The same for red and pink together, as the captions of the training data have it."""
CERTAIN: Final = 0.95
"""Chance that the most certain pixel of a lesion reaches; a region without one is bare skin. On
ISIC 2017's training split it keeps 98.8 % of the lesions and takes 18 % of the squares of skin
beside them for one: mottled skin and hair, patches, second lesions (0.93: 99.1 % and 25 %; 0.97:
97.0 % and 11 %; from `training.measure --fit`)."""

_SKIN: Final = (226, 188, 168)
_WHITE: Final = ""  # no word of the vocabulary
_PALETTE: Final[tuple[tuple[str, tuple[int, int, int]], ...]] = (
    (_WHITE, (245, 232, 226)),
    ("reddish", (185, 70, 72)),
    ("reddish", (222, 140, 135)),
    ("light brown", (172, 118, 82)),
    ("dark brown", (92, 55, 40)),
    ("blue gray", (98, 104, 120)),
    ("black", (32, 26, 27)),
    ("skin-coloured", _SKIN),
)
"""Colour word -> sRGB. A pixel has the word of the nearest one in CIELAB."""

_MEASURED = 224  # pixels; the side at which the thresholds above were taken, with these lengths:
_ERODE, _DILATE, _SMOOTH = 2, 6, 2.0

SIDE: Final = 96
"""Pixels a side of the map that is searched for the lesion."""
_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32)
_OFF_CENTRE = (np.hypot(_ROWS - (SIDE - 1) / 2, _COLUMNS - (SIDE - 1) / 2) / (SIDE / 2)) ** 2
_RIM = np.minimum.reduce([_ROWS, _COLUMNS, SIDE - 1 - _ROWS, SIDE - 1 - _COLUMNS]) < SIDE // 8
_ENOUGH = 50  # pixels; fewer give no reliable mean

FIRST: Final[tuple[float, ...]] = (
    -6.8311, 0.31932, 2.0807, 0.11779, 1.785, -3.2891, -1.4126, 0.69711, 3.4504, -2.3843,
    14.071, -5.5394, -1.6448, -3.2866, 0.57349, -0.43522, -6.3923,
)  # fmt: skip
"""Intercept and weights over `first_features`."""
SECOND: Final[tuple[float, ...]] = (
    -4.0552, 0.68784, -2.4401, 0.82457, 2.6264, -0.451, 3.0295, 0.49635, 6.0908, -1.7437,
    3.4977, -1.5087, -2.4426, -5.1555, -1.3367, 4.7835, -0.91532, 0.49303, -0.63661,
)  # fmt: skip
"""Intercept and weights over `second_features`."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one picture; the numbers are 0 and the words absent if nothing is found.

    Attributes:
        found: whether there is a lesion.
        area: share of the picture, 0..1.
        diameter: largest (Feret) diameter by the picture's height, 0..1.42 in a square.
        asymmetry: part of the area that is not matched by its mirror image, mean over both
            principal axes, 0..1.
        compactness: perimeter^2 / (4 pi area) of the smoothed outline; about 1 for a disc.
        touch: share of the outline that lies at the picture's edge, 0..1.
        contrast: distance of the lesion's mean colour from the skin's, CIE dE 1976.
        shares: colour word -> share of the lesion's pixels that are not skin-coloured (white has no
            word, so they may sum to less than 1); "skin-coloured" -> share of all its pixels. Where
            that is near 1, the others stand on few pixels, and so do the words of `colors`.
        size, asymmetry_word, border_word, colors: words of `dermaflux.prompt`. A lesion cut off by
            the edge has size "edge" and no words for asymmetry and border.
    """

    found: bool
    area: float
    diameter: float
    asymmetry: float
    compactness: float
    touch: float
    contrast: float
    shares: Mapping[str, float]
    size: str | None
    asymmetry_word: str | None
    border_word: str | None
    colors: tuple[str, ...]


NOTHING: Final = Measured(
    False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(COLORS, 0.0), None, None, None, ()
)


def measure(image: NDArray[np.uint8], mask: Mask | None = None) -> Measured:
    """Measure uint8 [H, W, 3], with the lesion's mask [H, W] or with `segment`'s.

    Pictures over 224 px are shrunk to that height, where the words' thresholds were taken.

    Raises:
        ValueError: image or mask of another shape or type.
    """
    _check(image)
    if mask is None:
        mask = segment(image)
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
        raise ValueError(
            f"the mask is {mask.dtype} {mask.shape}, but the picture needs bool {image.shape[:2]}"
        )
    if image.shape[0] > _MEASURED:
        width = max(1, round(image.shape[1] * _MEASURED / image.shape[0]))
        image, mask = _resize(image, _MEASURED, width), _resize_mask(mask, _MEASURED, width)
    if not mask.any():
        return NOTHING
    whole = _largest(mask)
    contrast, shares = _colours(image, mask)
    diameter = _feret(whole) / len(whole)
    asymmetry, compactness, touch = _asymmetry(whole), _compactness(whole), _touch(whole)
    cut_off = touch >= TOUCH
    named = tuple(
        word
        for word in COLORS[1:]
        if shares[word] >= (NAMED_REDDISH if word == "reddish" else NAMED)
    )
    return Measured(
        found=True,
        area=float(mask.mean()),
        diameter=diameter,
        asymmetry=asymmetry,
        compactness=compactness,
        touch=touch,
        contrast=contrast,
        shares=shares,
        size="edge" if cut_off else _word(diameter, SIZE_STEPS, ("small", "medium", "large")),
        asymmetry_word=None if cut_off else _word(asymmetry, ASYMMETRY_STEPS, ASYMMETRIES),
        border_word=None if cut_off else _word(compactness, BORDER_STEPS, BORDERS),
        colors=named or ("skin-coloured",),
    )


def segment(image: NDArray[np.uint8]) -> Mask:
    """The lesion in uint8 [H, W, 3], as bool [H, W]; all False where there is only skin.

    It is one connected region without holes. Any aspect is squashed to a square inside.

    Raises:
        ValueError: another shape or type.
    """
    _check(image)
    view = look(image)
    chance = probability(first_features(view), FIRST)
    chance = probability(second_features(view, chance), SECOND)
    mask = region(view, chance)
    height, width = image.shape[:2]
    if certainty(chance, mask) < CERTAIN:
        return np.zeros((height, width), dtype=np.bool_)
    return _resize_mask(mask, height, width)


def dice(a: Mask, b: Mask) -> float:
    """Overlap of two masks, 2 |a and b| / (|a| + |b|), 0..1; two empty masks agree: 1."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


@dataclass(frozen=True)
class View:
    """A picture as the models see it.

    Attributes:
        lab: [96, 96, 3] CIELAB (D65), without hair: L closed by 5 px, a and b blurred.
        usable: [96, 96], False in black corners, coloured patches and ink.
    """

    lab: Floats
    usable: Mask


def look(image: NDArray[np.uint8]) -> View:
    """uint8 [H, W, 3] -> what the models see of it."""
    lab = np.asarray(color.rgb2lab(_resize(image, SIDE, SIDE)), dtype=np.float32)
    lab[..., 0] = ndimage.grey_closing(lab[..., 0], size=(5, 5))
    lab[..., 1:] = ndimage.gaussian_filter(lab[..., 1:], (1.5, 1.5, 0))
    corners, _ = ndimage.label(lab[..., 0] < 22)
    kept = np.setdiff1d(corners[[0, 0, -1, -1], [0, -1, 0, -1]], 0)
    away = ndimage.binary_dilation(np.isin(corners, kept), iterations=4)
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    light, vivid, blue = (np.median(plane) for plane in (lab[..., 0], chroma, lab[..., 2]))
    # A patch is more vivid than skin and no darker, and comes in from the edge; ink is violet.
    patches, _ = ndimage.label((chroma > vivid + 18) & (lab[..., 0] > light - 22))
    edge = np.setdiff1d(np.concatenate([patches[0], patches[-1], patches[:, 0], patches[:, -1]]), 0)
    ink = (lab[..., 2] < -12) & (chroma > 15) & (lab[..., 2] < blue - 20)
    away |= ndimage.binary_dilation(np.isin(patches, edge) | ink, iterations=2)
    if (~away).sum() < _ENOUGH:
        away[:] = False
    return View(lab, ~away)


def first_features(view: View) -> Floats:
    """[96, 96, 16]: how each pixel differs from the skin at the border, and where it is."""
    rim = view.usable & _RIM
    if rim.sum() < 4 * _ENOUGH:  # a vignette all round: the outermost of what it leaves
        rim = view.usable & ~ndimage.binary_erosion(view.usable, iterations=8, border_value=1)
    if rim.sum() < _ENOUGH:
        rim = view.usable
    light = view.lab[..., 0]
    # A lesion that reaches the edge is the darker part of it.
    skin = np.median(view.lab[rim & (light >= np.median(light[rim]))], axis=0)
    near = (skin - ndimage.gaussian_filter(view.lab, (1, 1, 0))) / 10
    wide = (skin - ndimage.gaussian_filter(view.lab, (5, 5, 0))) / 10
    distance, distance_wide = np.linalg.norm(near, axis=-1), np.linalg.norm(wide, axis=-1)
    strongest = np.percentile(distance[view.usable], 95) + 0.3
    relative = np.minimum(distance / strongest, 1)
    low, middle, high = np.percentile(near[..., 0][view.usable], [10, 50, 90])
    darkness = np.clip((near[..., 0] - middle) / (high - low + 0.2), -1, 1)
    planes = [*np.moveaxis(near, -1, 0), *np.moveaxis(wide, -1, 0)]
    planes += [np.minimum(distance, 4), np.sqrt(distance), distance_wide, relative, relative**2]
    planes += [distance_wide / strongest, darkness, _OFF_CENTRE, _OFF_CENTRE**2]
    planes += [_OFF_CENTRE * relative]
    return np.stack(planes, axis=-1).astype(np.float32)


def second_features(view: View, chance: Floats) -> Floats:
    """[96, 96, 18]: each pixel between the mean colours of skin and lesion, as weighed."""
    blurred = ndimage.gaussian_filter(view.lab, (0.7, 0.7, 0))
    inside = chance * view.usable
    skin, body, core = (
        (blurred * weight[..., None]).sum((0, 1)) / (weight.sum() + 1e-3)
        for weight in (view.usable - inside, inside, inside**3)
    )
    offset = blurred - skin
    along = offset @ (body - skin) / (((body - skin) ** 2).sum() + 4)
    along_core = offset @ (core - skin) / (((core - skin) ** 2).sum() + 4)
    from_skin = np.linalg.norm(offset, axis=-1)
    # Whatever lies beyond the lesion's mean is lesion all the more.
    from_body = np.where(along > 1, 0, np.linalg.norm(blurred - body, axis=-1))
    between = from_skin / (from_skin + from_body + 1)
    along, along_core = np.clip(along, -1, 1), np.clip(along_core, -1, 1)
    area, total = inside.mean(), inside.sum() + 1e-3
    row, column = (_ROWS * inside).sum() / total, (_COLUMNS * inside).sum() / total
    radius = np.sqrt(area / np.pi) * SIDE + 2
    off_lesion = np.minimum(np.hypot(_ROWS - row, _COLUMNS - column) / radius, 3)
    wide = ndimage.gaussian_filter(chance, 4)
    planes = [np.log((chance + 0.01) / (1.01 - chance)), chance, wide]
    planes += [ndimage.gaussian_filter(chance, 10), along, along_core, between]
    planes += [ndimage.gaussian_filter(between, 2), ndimage.gaussian_filter(along, 3)]
    planes += [off_lesion, off_lesion**2, off_lesion * between, area * between, along * wide]
    planes += [np.full_like(chance, area), np.full_like(chance, np.linalg.norm(body - skin) / 20)]
    planes += [np.minimum(from_skin / 10, 4), _OFF_CENTRE]
    return np.stack(planes, axis=-1).astype(np.float32)


def probability(features: Floats, weights: tuple[float, ...]) -> Floats:
    """[..., F] and intercept + F weights -> chance of lesion [...], 0..1."""
    score = features @ np.asarray(weights[1:], dtype=np.float32) + weights[0]
    return np.asarray(1 / (1 + np.exp(-np.clip(score, -30, 30))), dtype=np.float32)


def region(view: View, chance: Floats) -> Mask:
    """The one region of [96, 96] that is large and central, filled; all False where none is."""

    likely = (ndimage.gaussian_filter(chance, 1) > 0.5) & view.usable
    labels, count = ndimage.label(ndimage.binary_opening(likely, np.ones((3, 3), dtype=np.bool_)))
    if count == 0:
        return np.zeros_like(likely)
    weights = ndimage.sum_labels(chance * np.exp(-2 * _OFF_CENTRE), labels, range(1, count + 1))
    return np.asarray(ndimage.binary_fill_holes(labels == 1 + int(np.argmax(weights))))


def certainty(chance: Floats, mask: Mask) -> float:
    """The highest chance in a region, 0..1; 0 for an empty one."""
    return float(chance[mask].max(initial=0.0))


def _colours(image: NDArray[np.uint8], mask: Mask) -> tuple[float, dict[str, float]]:
    """Contrast (dE) and colour shares, both after the skin is scaled to a reference colour."""
    scale = len(image) / _MEASURED
    inner = ndimage.binary_erosion(mask, iterations=max(1, round(_ERODE * scale)))
    if not inner.any():
        inner = mask
    light = image @ np.array([0.299, 0.587, 0.114])
    around = ~ndimage.binary_dilation(mask, iterations=max(1, round(_DILATE * scale))) & (
        light > 60
    )
    if around.sum() < _ENOUGH:  # the lesion fills the field: its palest pixels stand for skin
        around = light >= np.percentile(light, 90)
    bright = around & (light >= np.median(light[around]))
    balance = np.array(_SKIN) / np.maximum(np.median(image[bright], axis=0), 1)
    lab = color.rgb2lab(np.clip(image * balance, 0, 255) / 255)
    palette = color.rgb2lab(np.array([[rgb for _, rgb in _PALETTE]]) / 255)[0]
    contrast = float(np.linalg.norm(lab[inner].mean(axis=0) - palette[-1]))
    distances = ((lab[inner][:, None] - palette) ** 2).sum(axis=-1)
    counts = np.bincount(distances.argmin(axis=1), minlength=len(palette))
    pigment = max(1, int(counts[:-1].sum()))
    shares = dict.fromkeys(COLORS, 0.0)
    for (word, _), count in zip(_PALETTE[:-1], counts[:-1], strict=True):
        if word != _WHITE:
            shares[word] += float(count / pigment)
    shares["skin-coloured"] = float(counts[-1] / counts.sum())
    return contrast, shares


def _feret(mask: Mask) -> float:
    (found,) = regionprops(mask.astype(np.uint8))  # type: ignore[no-untyped-call]
    return float(found.feret_diameter_max)


def _asymmetry(mask: Mask) -> float:
    points = np.argwhere(mask)
    if len(points) < 3:
        return 0.0
    centre = points.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov((points - centre).T))
    reach = int(np.ceil(np.linalg.norm(points - centre, axis=1).max())) + 1
    grid = np.moveaxis(np.mgrid[-reach : reach + 1, -reach : reach + 1], 0, -1)
    source = np.moveaxis(grid @ axes.T + centre, -1, 0)
    turned = ndimage.map_coordinates(mask.astype(np.float32), source, order=1) > 0.5
    odd = (turned ^ turned[::-1]).sum() + (turned ^ turned[:, ::-1]).sum()
    return float(odd / (4 * max(1, int(turned.sum()))))


def _compactness(mask: Mask) -> float:
    sigma = _SMOOTH * len(mask) / _MEASURED
    smooth = ndimage.gaussian_filter(np.pad(mask, 8).astype(np.float32), sigma) > 0.5
    area = int(smooth.sum())
    length = float(perimeter(smooth))  # type: ignore[no-untyped-call]
    return length**2 / (4 * np.pi * area) if area else 0.0


def _touch(mask: Mask) -> float:
    outline = mask & ~ndimage.binary_erosion(mask)
    inside = outline[1:-1, 1:-1].sum()
    return float(1 - inside / outline.sum())


def _word(value: float, steps: tuple[float, float], words: tuple[str, ...]) -> str:
    return words[int(np.searchsorted(steps, value, side="right"))]


def _largest(mask: Mask) -> Mask:
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(labels == largest))


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.uint8)


def _resize_mask(mask: Mask, height: int, width: int) -> Mask:
    soft: NDArray[Any] = ndimage.gaussian_filter(mask.astype(np.float32), 0.7)
    picture = Image.fromarray(soft).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture) > 0.5


def _check(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape) < 1:
        raise ValueError(
            f"the picture is {image.dtype} {image.shape}, but uint8 [H, W, 3] is needed"
        )
