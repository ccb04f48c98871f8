"""The mark in a picture that was cut: where in which original does this piece belong?

A cut shifts the cosines, so all places of an original are tried at once, by correlation over FFTs:
the piece against the pattern as it was drawn for an original of each likely size. The piece has to
have the pixels that it had: cut and then resized, it is found only where its scale is given.

    >>> find(mark, piece, sizes=[(512, 512)])
    Crop(found=Found(score=21.8, ...), size=(512, 512), top=40, left=96)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.marks.spectrum import Floats, evened, luminance, of_evened
from dermaflux.marks.symbols import Signs
from dermaflux.marks.watermark import Found, Watermark, bandwidth_of, chance, drawn

SIZES: Final = ((128, 128), (256, 256), (512, 512), (768, 768), (1024, 1024))
"""Height and width of the originals that are tried if nothing is known: usual sizes of drawing."""
LARGEST: Final = 1536
"""Pixels a side. An original beyond it is not tried, for what that costs."""
SMALLEST: Final = 64
"""Pixels a side of a piece."""
_NEAR: Final = 4
"""Frequencies to each side that a frequency's own scale is taken from."""


@dataclass(frozen=True)
class Crop:
    """The best place of a piece: in an original of `size` (height, width), at `top` and `left`."""

    found: Found
    size: tuple[int, int]
    top: int
    left: int


def find(
    mark: Watermark, piece: NDArray[np.uint8], sizes: Iterable[tuple[int, int]] = SIZES
) -> Crop | None:
    """The best place of `piece`, uint8 [h, w, 3], in originals of `sizes`; None if it fits in none.

    The p-value counts every place, size and key that was tried.
    """
    height, width = piece.shape[:2]
    originals = [
        (high, wide)
        for high, wide in dict.fromkeys(sizes)
        if height <= high <= LARGEST
        and width <= wide <= LARGEST
        and (height, width) != (high, wide)
    ]
    if min(height, width) < SMALLEST or not originals:
        return None
    luma = luminance(piece)
    tries = len(mark.keys) * sum(
        (high - height + 1) * (wide - width + 1) for high, wide in originals
    )
    best: Crop | None = None
    for size in originals:
        even = evened(luma, bandwidth_of(*size))
        for number, key in enumerate(mark.keys):
            score, top, left = _place(even, key, size)
            if best is None or score > best.found.score:
                found = Found(score, chance(score, tries), tries, key=number)
                best = Crop(found, size, top, left)
    return None if best is None else _read(best, mark.keys[best.found.key], luma)


def _read(crop: Crop, key: bytes, luma: Floats) -> Crop:
    """With the payload, where the mark is there: the piece is put back where it was, on nothing."""
    if not crop.found.present:
        return crop
    bandwidth = bandwidth_of(*crop.size)
    height, width = luma.shape
    whole = np.zeros(crop.size, np.float32)
    whole[crop.top : crop.top + height, crop.left : crop.left + width] = evened(luma, bandwidth)
    payload = Signs.of(key, bandwidth).read(of_evened(whole, bandwidth))
    return replace(crop, found=replace(crop.found, payload=payload))


def _place(even: Floats, key: bytes, size: tuple[int, int]) -> tuple[float, int, int]:
    """The best score of a piece in one original, and its place.

    Scores are over the deviation of all places, of which at most one is the right one: by the
    central limit theorem they are normal where there is no mark.
    """
    signs = Signs.of(key, bandwidth_of(*size))
    pattern = np.fft.rfft2(drawn(signs.piloted, *size))
    seen = np.fft.rfft2(even, s=size)
    # The padding to the original's size spreads every frequency over its neighbours, so the scale
    # is taken over as many more.
    spread = [_NEAR * math.ceil(whole / part) for whole, part in zip(size, even.shape, strict=True)]
    power = np.abs(seen) ** 2
    scale = np.sqrt(_smoothed(power, spread)) + 1e-6
    flat = seen / scale
    large = np.maximum(np.abs(flat), 2.0) / 2.0
    surface = np.fft.irfft2(pattern * np.conj(flat / large), s=size)
    deviation = float(surface.std())
    if deviation == 0.0:  # a piece of one colour, which fits everywhere and nowhere
        return 0.0, 0, 0
    valid = surface[: size[0] - even.shape[0] + 1, : size[1] - even.shape[1] + 1]
    top, left = np.unravel_index(int(valid.argmax()), valid.shape)
    return float(valid[top, left] / deviation), int(top), int(left)


def _smoothed(values: NDArray[np.float64], reach: Sequence[int]) -> NDArray[np.float64]:
    """The mean over a window; around the ends it wraps down and mirrors across, as spectra do."""
    for axis, near in enumerate(reach):
        pads = [(0, 0), (0, 0)]
        pads[axis] = (near + 1, near)
        mode = "wrap" if axis == 0 else "reflect"
        near = min(near, values.shape[axis] - 1)
        sums = np.pad(values, pads, mode=mode).cumsum(axis)  # type: ignore[call-overload]
        upper = np.take(sums, range(2 * near + 1, sums.shape[axis]), axis)
        lower = np.take(sums, range(sums.shape[axis] - 2 * near - 1), axis)
        values = (upper - lower) / (2 * near + 1)
    return values
