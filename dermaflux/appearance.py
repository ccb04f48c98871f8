"""What a picture looks like, in numbers that need no model: light, sharpness, colours, texture.

Measured on the square that the classifier sees, shrunk to `SIDE` pixels: what is lost there is lost
for the classifier too, and a picture's own size plays no part.

    >>> pixels = square(Image.open("lesion.jpg"))
    >>> measure(pixels).sharpness
    2.9
    >>> describe(pixels).shape
    (124,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.flow import Floats

Pixels = NDArray[np.uint8]

SIDE: Final = 128
"""Pixels. A power of two, halved seven times below."""
LENGTH: Final = 124
"""Numbers of a description."""
_CELLS: Final = 16
_LUMA: Final = np.array((0.299, 0.587, 0.114), np.float32)
"""Of ITU-R BT.601, as Pillow's conversion to grey."""
_XYZ: Final = np.array(
    ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)), np.float32
)
"""Linear sRGB to XYZ, IEC 61966-2-1."""
_WHITE: Final = np.array((0.9505, 1.0, 1.089), np.float32)
"""D65."""


@dataclass(frozen=True)
class Quality:
    """How well a picture was taken. Grey values are 0 to 255.

    `light` is the grey value that a twentieth of the picture is above, `shade` the one that a
    twentieth is below; `clipped` the share with a channel at its end (250 or more); `contrast` the
    standard deviation of grey; `sharpness` and `grain` are natural logarithms of the Laplacian:
    its standard deviation (edges and structures), and the median of its size (everywhere, as
    noise is).
    """

    light: float
    shade: float
    clipped: float
    contrast: float
    sharpness: float
    grain: float


def square(picture: Image.Image) -> Pixels:
    """The centre square of an RGB picture, [SIDE, SIDE, 3]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # Not `box` of resize, whose filter looks beyond it.
    middle = picture.crop((left, top, left + side, top + side))
    middle = middle if middle.mode == "RGB" else middle.convert("RGB")
    small = middle.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(small)


def measure(pixels: Pixels) -> Quality:
    """The quality of a square picture [SIDE, SIDE, 3]."""
    grey = pixels.astype(np.float32) @ _LUMA
    inner = grey[1:-1, 1:-1]
    laplacian = 4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    shade, light = np.percentile(grey, (5, 95))
    return Quality(
        light=float(light),
        shade=float(shade),
        clipped=float((pixels >= 250).any(-1).mean()),
        contrast=float(grey.std()),
        # Of a picture without any edge the logarithm would be minus infinity.
        sharpness=float(np.log(laplacian.std() + 0.01)),
        grain=float(np.log(np.median(np.abs(laplacian)) + 0.01)),
    )


def describe(pixels: Pixels) -> Floats:
    """A square picture [SIDE, SIDE, 3] -> float32 [124], in CIELAB: quantiles of its colours, their
    spread and correlation, rings around the centre and opposite edges, contrast by octave, how
    gradients are spread over places and directions, and how well a bowl fits its lightness.

    Logarithms where a measure spans orders of magnitude; the small numbers added keep those of a
    picture of one colour finite.
    """
    lab = _lab(pixels)
    cells = _halved(lab, SIDE // _CELLS)
    values = cells.reshape(-1, 3)
    return np.concatenate(
        [
            np.quantile(values, (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98), axis=0).ravel(),
            np.log(lab.reshape(-1, 3).std(0) + 0.3),
            _correlations(values),
            _places(cells),
            _octaves(lab),
            *_gradients(lab[..., 0]),
            _bowl(values),
        ]
    ).astype(np.float32)


def _lab(pixels: Pixels) -> Floats:
    """uint8 sRGB -> CIELAB: 0 to 100, and about -100 to 100 twice."""
    shares = np.arange(256, dtype=np.float32) / 255
    linear = np.where(shares > 0.04045, ((shares + 0.055) / 1.055) ** 2.4, shares / 12.92)
    xyz = linear.astype(np.float32)[pixels] @ _XYZ.T / _WHITE
    bent = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1).astype(np.float32)


def _halved(values: Floats, times: int = 2) -> Floats:
    """Means over squares of `times` pixels a side, a power of two. By slices: numpy's mean over two
    axes of four takes five times as long."""
    while times > 1:
        rows = values[0::2] + values[1::2]
        values = np.asarray((rows[:, 0::2] + rows[:, 1::2]) / 4, np.float32)
        times //= 2
    return values


def _correlations(values: Floats) -> NDArray[Any]:
    centred = values - values.mean(0)
    spread = values.std(0) + 0.5
    pairs = ((0, 1), (0, 2), (1, 2))
    return np.array(
        [(centred[:, i] * centred[:, j]).mean() / spread[i] / spread[j] for i, j in pairs]
    )


def _places(cells: Floats) -> NDArray[Any]:
    """Three rings less the corners, and opposite edges' difference."""
    rows, columns = np.mgrid[-1 : 1 : _CELLS * 1j, -1 : 1 : _CELLS * 1j]
    far = np.hypot(rows, columns)
    edges = (0.0, 0.4, 0.75, 1.05, 2.0)
    rings = [cells[(far >= a) & (far < b)].mean(0) for a, b in zip(edges, edges[1:], strict=False)]
    up, down = cells[:3].mean((0, 1)), cells[-3:].mean((0, 1))
    left, right = cells[:, :3].mean((0, 1)), cells[:, -3:].mean((0, 1))
    return np.concatenate([*(ring - rings[-1] for ring in rings[:-1]), up - down, left - right])


def _octaves(lab: Floats) -> NDArray[Any]:
    """Spread and mean size of what each halving takes away, by channel."""
    found = []
    for _ in range(5):
        low = _halved(lab)
        lost = lab - low.repeat(2, 0).repeat(2, 1)
        found += [np.log(lost.std((0, 1)) + 0.05), np.log(np.abs(lost).mean((0, 1)) + 0.05)]
        lab = low
    return np.concatenate(found)


def _gradients(grey: Floats) -> list[NDArray[Any]]:
    """Over 8 x 8 places and four octaves: quantiles of the energy, how far it has one direction
    (the structure tensor's coherence: hair, fur and rulers have), the whole picture's direction,
    and how rare strong edges are (a kurtosis)."""
    found: list[NDArray[Any]] = []
    for _ in range(4):
        across = np.pad(grey[1:-1, 2:] - grey[1:-1, :-2], 1, mode="edge")
        down = np.pad(grey[2:, 1:-1] - grey[:-2, 1:-1], 1, mode="edge")
        # From here each is [8, 8].
        xx, yy, xy = (
            _halved(product, len(grey) // 8)
            for product in (across * across, down * down, across * down)
        )
        energy = xx + yy
        found.append(np.log(np.quantile(energy, (0.05, 0.25, 0.5, 0.75, 0.95)) + 0.05))
        found.append(np.quantile(_coherence(xx, yy, xy), (0.25, 0.5, 0.75)))
        found.append(_coherence(xx.mean(), yy.mean(), xy.mean()).reshape(1))
        size = across**2 + down**2
        found.append(np.log((size**2).mean() / (size.mean() ** 2 + 0.01) + 0.1).reshape(1))
        grey = _halved(grey)
    return found


def _coherence(xx: Any, yy: Any, xy: Any) -> NDArray[Any]:
    """0 where gradients go every way, 1 where they go one way. Source: Bigün and Granlund,
    Optimal orientation detection of linear symmetry (1987)."""
    return np.asarray(np.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy + 0.5))


def _bowl(values: Floats) -> NDArray[Any]:
    """How badly a quadratic of the place fits each channel, its depth, slope and squint."""
    rows, columns = np.mgrid[-1 : 1 : _CELLS * 1j, -1 : 1 : _CELLS * 1j]
    terms = (np.ones_like(rows), columns, rows, columns**2, rows**2, columns * rows)
    basis = np.stack(terms, -1).reshape(-1, 6)
    fit = np.linalg.pinv(basis) @ values
    rest = (values - basis @ fit).var(0) / (values.var(0) + 1)
    slope = np.abs(fit[1]) + np.abs(fit[2])
    return np.concatenate([rest, fit[3] + fit[4], slope, np.hypot(fit[3] - fit[4], fit[5])])
