"""How near two lists of pictures are, and two lists of probabilities.

>>> pictures(made, references)
{"psnr_db": {"median": 52.7, "worst": 38.6, "p10": 47.1, "p90": 55.0}, "ssim": {...}}
>>> auc(probabilities, malignant)
0.7509
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.decode import Pixels
from dermaflux.golden import psnr

RESAMPLES: Final = 2000
_INTERVAL: Final = (0.025, 0.975)

Numbers = NDArray[np.float64]


def pictures(made: Sequence[Pixels], references: Sequence[Pixels]) -> dict[str, dict[str, float]]:
    """PSNR in dB (99 stands for equal) and SSIM (1 is equal) over pairs of uint8 [H, W, 3]."""
    pairs = list(zip(made, references, strict=True))
    return {
        "psnr_db": _low([psnr(*pair) for pair in pairs], 2),
        "ssim": _low([ssim(*pair) for pair in pairs], 5),
    }


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity of uint8 [H, W, 3], 7 x 7 windows per channel, as scikit-image has it.

    Source: Wang et al., Image Quality Assessment (2004).
    """
    from skimage.metrics import structural_similarity

    found = structural_similarity(image, reference, channel_axis=2)  # type: ignore[no-untyped-call]
    return float(found)


def auc(scores: Numbers, positive: NDArray[np.bool_], weights: Numbers | None = None) -> Numbers:
    """The area under the ROC curve, ties counted half (Mann and Whitney, 1947): float64 [...].

    `weights` float64 [..., n] counts each of the n scores so many times; where there is none of a
    class the area is not a number.
    """
    order = np.argsort(scores, kind="stable")
    counts = np.ones(len(scores)) if weights is None else weights[..., order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    good = np.add.reduceat(counts * positive[order], starts, axis=-1)
    bad = np.add.reduceat(counts * ~positive[order], starts, axis=-1)
    below = np.cumsum(bad, axis=-1) - bad / 2
    with np.errstate(invalid="ignore"):
        area: Numbers = (good * below).sum(axis=-1) / (good.sum(axis=-1) * bad.sum(axis=-1))
    return area


def auc_change(
    scores: Numbers, base: Numbers, positive: NDArray[np.bool_], groups: Sequence[str]
) -> tuple[float, float, float]:
    """The AUC of `scores` less that of `base`, and its 95 % interval.

    A paired bootstrap over `groups` (patients or lesions, whose pictures are alike), percentiles of
    `RESAMPLES` draws, the same every time.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = draws[:, group].astype(np.float64)
    change = auc(scores, positive, weights) - auc(base, positive, weights)
    low, high = np.nanquantile(change, _INTERVAL)
    return float(auc(scores, positive) - auc(base, positive)), float(low), float(high)


def _low(values: Sequence[float], digits: int) -> dict[str, float]:
    """Median, worst and percentiles of what is better the larger it is."""
    found = {"median": np.median(values), "worst": np.min(values),
             "p10": np.quantile(values, 0.1), "p90": np.quantile(values, 0.9)}  # fmt: skip
    return {name: round(float(value), digits) for name, value in found.items()}
