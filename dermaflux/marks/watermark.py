"""An invisible mark in the pixels: found again after JPEG, resizing and mild noise, with the key.

The key's signs are added to the lower cosines of the luminance, with one amplitude for all, as weak
as will survive: the first of four strengths whose mark is still found clearly after JPEG at quality
50. What is found has a p-value that holds for any picture that was never ours, whatever is in it.

    >>> mark = Watermark(key)
    >>> marked = mark.embed(pixels, payload=b"\\x00\\x01\\x02\\x03")
    >>> mark.find(marked.pixels).present
    True

This is no protection against somebody who wants it gone or forged: who has many marked pictures
can average them. The signature (`dermaflux.marks.credentials`) is what proves; the mark tells where
that was lost. `dermaflux.marks.crops` finds it in cut pictures. docs/provenance.md has figures.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.marks.spectrum import Floats, basis, coefficients, luminance
from dermaflux.marks.symbols import PAYLOAD_BYTES, PAYLOAD_FROM, Signs

Pixels = NDArray[np.uint8]

MIN_SIDE: Final = 64
"""Pixels: a smaller picture has too few coefficients, and is left unmarked."""
BANDWIDTHS: Final = (64, 128, 256)
"""The cosines used a side, for pictures whose shorter side is under 256, under 512, and larger."""
STRENGTHS: Final = (46.0, 44.0, 42.0, 40.5)
"""PSNR in dB of the marked picture: 46 is a deviation of 1.3 grey levels, 40.5 one of 2.4."""
ALARM: Final = 1e-6
"""A mark is said to be present if its p-value, all tries counted, is at most this."""

UPRIGHT: Final = "as it is"
"""How a picture lies that nobody turned."""

_LARGEST: Final = 1024
"""Pixels a side that are looked at; larger pictures are averaged down first."""
_TEST_QUALITY: Final = 50
_CLEAR: Final = {64: 10.0, 128: 16.0, 256: 16.0}
"""Scores wanted after the test: 6 is needed to be found, and a payload needs some 16."""


@dataclass(frozen=True)
class Marked:
    """A marked picture. `psnr_db` is its distance to the one given; None where it is unmarked.

    `sure` is whether the mark survived the test by JPEG.
    """

    pixels: Pixels
    psnr_db: float | None
    sure: bool


@dataclass(frozen=True)
class Found:
    """What was found of a mark.

    `score` is in standard deviations of chance, `p_value` the probability that any picture that was
    never marked scores so by chance in any of `tries`; `payload` is four bytes where they came out.
    `view` is how the picture lies (`"as it is"`, `"flipped"`, ...), `key` the number of the key.
    """

    score: float
    p_value: float
    tries: int
    payload: bytes | None = None
    view: str = UPRIGHT
    key: int = 0

    @property
    def present(self) -> bool:
        """Whether chance is ruled out."""
        return self.p_value <= ALARM


class Watermark:
    """Marks with the first of `keys`, looks for all of them (old ones, say)."""

    def __init__(self, *keys: bytes) -> None:
        assert keys, "one key at least"
        self.keys = keys

    def embed(self, pixels: Pixels, payload: bytes = bytes(PAYLOAD_BYTES)) -> Marked:
        """A copy of uint8 [h, w, 3] with the mark, and the payload from 256 pixels a side on."""
        height, width = pixels.shape[:2]
        if min(height, width) < MIN_SIDE:
            return Marked(pixels, None, False)
        bandwidth = bandwidth_of(height, width)
        signs = Signs.of(self.keys[0], bandwidth)
        pattern = drawn(signs.pattern(payload), height, width)
        sure = False
        marked = pixels
        for strength in STRENGTHS:
            step = 255 / 10 ** (strength / 20) * pattern
            marked = np.clip(np.rint(pixels + step[..., None]), 0, 255).astype(np.uint8)
            sure = self._survives(marked, signs, bandwidth, payload)
            if sure:
                break
        return Marked(marked, psnr(pixels, marked), sure)

    def find(self, pixels: Pixels) -> Found:
        """Look for the mark in a whole picture uint8 [h, w, 3], of any size, flipped or turned."""
        luma = luminance(reduced(pixels))
        best = Found(0.0, 1.0, len(self.keys) * len(BANDWIDTHS) * len(_VIEWS))
        for bandwidth in BANDWIDTHS:
            seen = coefficients(luma, bandwidth)
            for number, key in enumerate(self.keys):
                best = max(best, _scan(seen, key, number, best.tries), key=_score)
        return best

    def _survives(self, marked: Pixels, signs: Signs, bandwidth: int, payload: bytes) -> bool:
        stream = io.BytesIO()
        Image.fromarray(marked).save(stream, "JPEG", quality=_TEST_QUALITY)
        with Image.open(stream) as tested:
            seen = coefficients(luminance(reduced(np.asarray(tested))), bandwidth)
        carried = bandwidth < PAYLOAD_FROM or signs.read(seen) == payload
        return carried and signs.score(seen) >= _CLEAR[bandwidth]


def bandwidth_of(height: int, width: int) -> int:
    """The bandwidth of a mark in a picture of this size."""
    side = min(height, width)
    return BANDWIDTHS[0 if side < 256 else 1 if side < 512 else 2]


def drawn(pattern: Floats, height: int, width: int) -> Floats:
    """Signs [b, b] as luminance [height, width] with a deviation of 1."""
    down, across = basis(height, len(pattern)), basis(width, len(pattern))
    wave = down.T @ pattern[: len(down), : len(across)] @ across
    unit: Floats = (wave / wave.std()).astype(np.float32)
    return unit


def reduced(pixels: Pixels) -> Pixels:
    """The picture, averaged down where it is larger than is worth looking at."""
    height, width = pixels.shape[:2]
    factor = math.ceil(max(height, width) / _LARGEST)
    return pixels if factor == 1 else np.asarray(Image.fromarray(pixels).reduce(factor))


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite where equal."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def chance(score: float, tries: int) -> float:
    """At most the probability of such a score in one of `tries`, without a mark (Hoeffding)."""
    return min(1.0, tries * math.exp(-score * score / 2)) if score > 0 else 1.0


_VIEWS: Final = {
    UPRIGHT: (False, False, False),
    "flipped left to right": (False, False, True),
    "flipped upside down": (False, True, False),
    "turned by 180 degrees": (False, True, True),
    "transposed": (True, False, False),
    "turned by 90 degrees clockwise": (True, False, True),
    "turned by 90 degrees anticlockwise": (True, True, False),
    "transposed along the other diagonal": (True, True, True),
}


def _scan(seen: Floats, key: bytes, number: int, tries: int) -> Found:
    """The best view of these coefficients for one key."""
    signs = Signs.of(key, len(seen))
    scores = _scores(seen, signs)
    name = max(scores, key=lambda view: scores[view])
    p_value = chance(scores[name], tries)
    payload = signs.read(_undone(seen, *_VIEWS[name])) if p_value <= ALARM else None
    return Found(scores[name], p_value, tries, payload, name, number)


def _scores(seen: Floats, signs: Signs) -> dict[str, float]:
    """`Signs.score` of every view: flips only turn the signs of four partial sums."""
    found: dict[str, float] = {}
    for transposed in (False, True):
        pilot = signs.piloted.T if transposed else signs.piloted
        agreed = (seen * pilot).astype(np.float64)
        length = np.sqrt(np.sum(agreed * agreed))
        part = [[agreed[down::2, across::2].sum() for across in (0, 1)] for down in (0, 1)]
        for name, (view, down, across) in _VIEWS.items():
            if view == transposed:
                signed = part[0][0] + (-1) ** down * part[1][0] + (-1) ** across * part[0][1]
                total = signed + (-1) ** (down + across) * part[1][1]
                found[name] = float(total / length) if length > 0 else 0.0
    return found


def _undone(seen: Floats, transposed: bool, down: bool, across: bool) -> Floats:
    """The coefficients of the picture before it was transposed, then flipped.

    A flip turns the signs of the odd waves along its axis.
    """
    odd = np.where(np.arange(len(seen)) % 2, -1, 1).astype(np.float32)
    seen = seen * odd[:, None] if down else seen
    seen = seen * odd[None, :] if across else seen
    return seen.T if transposed else seen


def _score(found: Found) -> float:
    return found.score
