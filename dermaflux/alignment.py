"""Lay one thumbnail upon another and say how alike they are, whatever the light: pure arrays.

For `dermaflux.duplicates`. All pictures are [n, 48, 48] thumbnails. Linear maps (blur, shrink,
cosine transform, centre crop) are small matrices applied from both sides, so a batch is a matrix
product. The alignment is Lucas and Kanade's (1981) with an affine warp, a gain and an offset,
from coarse to fine.

    >>> correlation(thumbs, turned(others, turn))
    array([0.94, 0.12], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SIDE: Final = 48
"""Pixels a side: at 32 a blob on skin looks like any other, at 64 recompression takes the texture
that makes the difference."""

_COARSE: Final = (16, 0.8, 6)
_FINE: Final = (32, 0.6, 4)
"""Pixels a side, blur in pixels, iterations: the parameters of a warp carry over."""
_SCALES: Final = (0.8, 1.25)
_SHEAR: Final = 0.2
_SHIFT: Final = 0.16
"""Bounds of the warp: crops of at most 20 %, some 11 degrees, a sixth of the side."""
_HOPELESS: Final = 0.35
"""Pairs less alike after the coarse alignment are not aligned finely: 99 of 100 copies pass, and
2 of 100 strangers (`training.duplicate_rates` shows what both come to)."""
_DETAIL: Final = 1.5
"""Blur, in pixels, whose rest is the detail; twice that far its contrast is levelled."""
_NOISE: Final = 3.0
"""Contrast, in grey levels of 255, below which detail is not amplified: noise of the codec."""


def unit(values: Floats) -> Floats:
    """Rows at unit length; rows of zeros stay."""
    length = np.linalg.norm(values, axis=1, keepdims=True)
    result: Floats = (values / np.maximum(length, 1e-6)).astype(np.float32)
    return result


def cosines(thumbs: NDArray[Any], count: int, part: float = 1.0) -> Floats:
    """The lowest `count` x `count` cosine coefficients, weighted by frequency: [n, count, count].

    Of the central `part` of each side where that is under 1. The mean has no weight: light differs.
    """
    matrix = _cosine_matrix(count) @ _centre_matrix(part)
    axis = np.arange(count, dtype=np.float32)
    result: Floats = _both(matrix, thumbs.astype(np.float32)) * np.hypot(axis[:, None], axis)
    return result


def turned_cosines(coefficients: Floats, turn: int) -> Floats:
    """The coefficients of turned pictures: a flip changes signs, a transpose transposes."""
    sign = (-1.0) ** np.arange(coefficients.shape[1], dtype=np.float32)
    result = np.swapaxes(coefficients, 1, 2) if turn & 4 else coefficients
    result = result * sign[:, None] if turn & 2 else result
    return result * sign if turn & 1 else result


def turned(thumbs: NDArray[Any], turns: NDArray[np.int64]) -> NDArray[Any]:
    """Each picture transposed (4), then flipped top to bottom (2), then left to right (1)."""
    result = thumbs.copy()
    for number, turn in enumerate(turns):
        one = thumbs[number].T if turn & 4 else thumbs[number]
        one = one[::-1] if turn & 2 else one
        result[number] = one[:, ::-1] if turn & 1 else one
    return result


def correlation(one: NDArray[Any], other: NDArray[Any], hopeless: float = _HOPELESS) -> Floats:
    """Correlation of detail after `other` was aligned with `one`: [n], -1 to 1.

    Detail is what a blur leaves, divided by its own local contrast, so that skin counts as much
    as the lesion. Flat pictures give 0. Pairs under `hopeless` after the coarse alignment keep
    what they had there.
    """
    a, b = one.astype(np.float32), other.astype(np.float32)
    warp = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float32), (len(a), 1))
    warp = _aligned(a, b, warp, *_COARSE)
    found = _alike(a, b, warp)
    near = np.flatnonzero(found >= hopeless)
    if len(near):
        a, b = a[near], b[near]
        found[near] = np.maximum(found[near], _alike(a, b, _aligned(a, b, warp[near], *_FINE)))
    return found


def _alike(one: Floats, other: Floats, warp: Floats) -> Floats:
    moved, inside = _sampled((_detail(other),), *_warped(warp, SIDE))
    return _correlated(_detail(one), moved[0], inside)


def _aligned(
    one: Floats, other: Floats, warp: Floats, side: int, blur: float, iterations: int
) -> Floats:
    """Better parameters, [n, 6], of the warps that lay `other` upon `one`; shifts are in sides."""
    rows, columns = _grid(side)
    edges = ((_SCALES, -_SHEAR, -_SHIFT), (_SCALES, _SHEAR, _SHIFT))
    lowest, highest = (
        np.array([scales[end], shear, shift, shear, scales[end], shift], np.float32)
        for end, (scales, shear, shift) in enumerate(edges)
    )
    units = np.array([1, 1, 1 / side, 1, 1, 1 / side], np.float32)
    matrix = _blur_matrix(side, blur) @ _shrink_matrix(side)
    target, source = _both(matrix, one), _both(matrix, other)
    sources: list[Floats] = [source, *np.gradient(source, axis=(1, 2))]
    for _ in range(iterations):
        (moved, dy, dx), inside = _sampled(sources, *_warped(warp, side))
        size = np.maximum(inside.sum((1, 2), keepdims=True), 1)
        mine = (target - (target * inside).sum((1, 2), keepdims=True) / size) * inside
        theirs = (moved - (moved * inside).sum((1, 2), keepdims=True) / size) * inside
        power = np.maximum((theirs**2).sum((1, 2), keepdims=True), 1e-3)
        gain = np.clip((theirs * mine).sum((1, 2), keepdims=True) / power, 0.3, 3.0)
        rest = (mine - gain * theirs).reshape(len(one), 1, -1)
        dy, dx = dy * gain * inside, dx * gain * inside
        slopes = np.stack([dy * rows, dy * columns, dy, dx * rows, dx * columns, dx], 1).reshape(
            len(one), 6, -1
        )
        normal = slopes @ slopes.transpose(0, 2, 1)
        trace = np.trace(normal, axis1=1, axis2=2)[:, None, None]
        normal += np.eye(6, dtype=np.float32) * (2e-4 * trace + 1e-3)
        step = np.linalg.solve(normal, (slopes * rest).sum(2)[..., None])[..., 0]
        warp = np.clip(warp + step * units, lowest, highest).astype(np.float32)
    return warp


def _warped(warp: Floats, side: int) -> tuple[Floats, Floats]:
    """Where each pixel of `one` lies in `other`: rows and columns, each [n, side, side]."""
    rows, columns = _grid(side)
    a, b, c, d, e, f = (warp[:, k, None, None] for k in range(6))
    middle, scale = (side - 1) / 2, side
    y = a * rows + b * columns + (c * scale + middle)
    x = d * rows + e * columns + (f * scale + middle)
    return y.astype(np.float32), x.astype(np.float32)


def _sampled(images: Sequence[Floats], y: Floats, x: Floats) -> tuple[list[Floats], Floats]:
    """Images at (y, x), linear between pixels, and 1 where that is inside them."""
    count, side = len(y), y.shape[1]
    inside = ((y >= 0) & (y <= side - 1) & (x >= 0) & (x <= side - 1)).astype(np.float32)
    y, x = np.clip(y, 0, side - 1.001), np.clip(x, 0, side - 1.001)
    row, column = y.astype(np.int32), x.astype(np.int32)
    a, b = y - row.astype(np.float32), x - column.astype(np.float32)
    first = np.arange(count, dtype=np.int32)[:, None, None] * side * side + row * side + column
    weights = ((1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b)
    places = (first, first + 1, first + side, first + side + 1)
    result: list[Floats] = []
    for image in images:
        flat = np.ascontiguousarray(image).reshape(-1)
        value = np.zeros_like(y)
        for place, weight in zip(places, weights, strict=True):
            value += flat.take(place) * weight
        result.append(value)
    return result, inside


def _detail(images: Floats) -> Floats:
    blur, wide = _blur_matrix(SIDE, _DETAIL), _blur_matrix(SIDE, 2 * _DETAIL)
    rest = images - _both(blur, images)
    contrast = np.sqrt(np.maximum(_both(wide, rest * rest), 0))
    return np.asarray(rest / (contrast + _NOISE), dtype=np.float32)


def _correlated(one: Floats, other: Floats, inside: Floats) -> Floats:
    size = np.maximum(inside.sum((1, 2), keepdims=True), 1)
    a = (one - (one * inside).sum((1, 2), keepdims=True) / size) * inside
    b = (other - (other * inside).sum((1, 2), keepdims=True) / size) * inside
    power = np.sqrt((a * a).sum((1, 2)) * (b * b).sum((1, 2)))
    # Under a mean detail of 0.02 there is nothing to compare: a black or a blank picture.
    enough = power > 4e-4 * size[:, 0, 0]
    value = np.where(enough, (a * b).sum((1, 2)) / np.maximum(power, 1e-6), 0)
    result: Floats = value.astype(np.float32)
    return result


def _both(matrix: Floats, images: Floats) -> Floats:
    """`matrix` applied to rows and to columns of each image."""
    # Two large products: numpy multiplies a stack by one matrix many times slower.
    count, height, width = images.shape
    right = np.ascontiguousarray(matrix.T)
    rows = (images.reshape(-1, width) @ right).reshape(count, height, -1)
    columns = np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(-1, height) @ right
    result: Floats = columns.reshape(count, len(matrix), -1).transpose(0, 2, 1)
    return result


@lru_cache
def _grid(side: int) -> tuple[Floats, Floats]:
    axis = np.arange(side, dtype=np.float32) - (side - 1) / 2
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    return rows, columns


@lru_cache
def _cosine_matrix(count: int) -> Floats:
    """The orthonormal DCT-II, its first `count` rows: [count, 48]."""
    phase = np.pi / SIDE * np.outer(np.arange(count), np.arange(SIDE) + 0.5)
    matrix = np.cos(phase) * np.sqrt(2 / SIDE)
    matrix[0] /= np.sqrt(2)
    result: Floats = matrix.astype(np.float32)
    return result


@lru_cache
def _centre_matrix(part: float) -> Floats:
    """The central `part` of a side, stretched to it, linear between pixels: [48, 48]."""
    place = (np.arange(SIDE) + 0.5) * part + SIDE * (1 - part) / 2 - 0.5
    left = np.clip(np.floor(place).astype(int), 0, SIDE - 2)
    matrix = np.zeros((SIDE, SIDE))
    matrix[np.arange(SIDE), left] = 1 - (place - left)
    matrix[np.arange(SIDE), left + 1] += place - left
    result: Floats = matrix.astype(np.float32)
    return result


@lru_cache
def _shrink_matrix(side: int) -> Floats:
    """Means over areas, 48 to `side` pixels: [side, 48]."""
    edges = np.arange(side + 1) * SIDE / side
    pixels = np.arange(SIDE)
    low = np.maximum(edges[:-1, None], pixels)
    high = np.minimum(edges[1:, None], pixels + 1)
    result: Floats = (np.maximum(high - low, 0) * side / SIDE).astype(np.float32)
    return result


@lru_cache
def _blur_matrix(side: int, sigma: float) -> Floats:
    """A Gaussian blur whose rows sum to 1, edges included: [side, side]."""
    axis = np.arange(side)
    matrix = np.exp(-((axis[:, None] - axis) ** 2) / (2 * sigma**2))
    # Numbers too small for float32 slow a product down a hundredfold.
    matrix[matrix < 1e-6] = 0
    result: Floats = (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    return result
