"""A small picture of what an image is going to be, while it is still being denoised.

The latents that a step predicts at the end of its line (`Batch.clean`) are averaged over squares of
2, 4 or 8 cells, and decoded: an eighth of the side costs about a sixty-fourth of the whole. From
averaged latents a decoder draws nearly the averaged picture. Measured on the embedded default at
128 pixels (half the side, OpenVINO, one thread): a preview takes as long as a step of one image and
0.3 of a whole decoding, and after the last step but one it is 31 dB from the image averaged.

    >>> latents = smaller(batch.clean("a"), factor(pipeline.limits, 1024, 1024))
    >>> (picture,) = pipeline.decode(latents[None])
"""

from __future__ import annotations

from dermaflux.bundle import Limits
from dermaflux.flow import Floats

FACTORS = (8, 4, 2)
SMALLEST = 64
"""Pixels of a preview's longer side at least: below that a lesion is a blot."""


def factor(limits: Limits, height: int, width: int) -> int:
    """By how much each side of a preview is smaller than the image's; 1 where nothing smaller goes.

    A side must be one that the bundle takes, since decoders are compiled for its sizes.
    """
    for by in FACTORS:
        sides = (height // by, width // by)
        if max(sides) >= SMALLEST and all(_allowed(limits, by, side) for side in (height, width)):
            return by
    return 1


def smaller(latents: Floats, by: int) -> Floats:
    """Latents [C, h, w] averaged over squares of `by` cells -> [C, h / by, w / by]."""
    channels, h, w = latents.shape
    small: Floats = latents.reshape(channels, h // by, by, w // by, by).mean(axis=(2, 4))
    return small


def moments(steps: int, previews: int) -> frozenset[int]:
    """After which of an image's steps, from 1, a preview is due: evenly, and never after the last.

    At most `previews`, and fewer where there are not as many steps before the last.
    """
    return frozenset(
        round(steps * number / (previews + 1)) for number in range(1, previews + 1)
    ) - {0, steps}


def _allowed(limits: Limits, by: int, side: int) -> bool:
    small, rest = divmod(side, by)
    return rest == 0 and small >= limits.min_size and small % limits.size_multiple == 0
