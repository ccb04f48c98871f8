"""ROC curves of one sample or of thousands of bootstrap draws at once, and what is read off them.

    >>> curve = roc(scores, labels)
    >>> area(curve), sensitivity_at(curve, 0.95)
    (array([0.86]), array([0.41]))

A curve has one point per distinct score: pictures of equal score are called malignant together, so
that the order of a file never counts. `weights` [D, N] say how often each picture stands in each of
D draws; scores are sorted once for all of them. Operating points are the curve's own, never between
two of them: each is a threshold that somebody could set.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.figures import Floats

Labels = NDArray[np.int64]
"""[N], 1 where malignant and 0 where benign."""

_ROUNDING: Final = 1e-9  # 0.05 of 140 is 7.000000000000001, and 7 of 140 must count as 0.05


class Curve(NamedTuple):
    """Shares of malignant (`tpr`) and benign (`fpr`) pictures called malignant: [D, K + 1].

    Both grow from 0 to 1. Point k calls those with a score of at least `thresholds[k]` [K + 1];
    the first calls none. NaN where a draw lacks the class.
    """

    tpr: Floats
    fpr: Floats
    thresholds: Floats


def roc(scores: Floats, labels: Labels, weights: Floats | None = None) -> Curve:
    """The curve of `scores` [N], larger for malignant; all NaN where a score is NaN."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.diff(ranked, prepend=np.nan) != 0)
    malignant = labels[order] == 1
    drawn = weights[:, order]
    called = [_cumulated(drawn * chosen, starts) for chosen in (malignant, ~malignant)]
    if np.isnan(scores).any():
        called = [np.full_like(shares, np.nan) for shares in called]
    return Curve(called[0], called[1], np.concatenate([[np.inf], ranked[starts]]))


def _cumulated(drawn: Floats, starts: NDArray[np.intp]) -> Floats:
    """Shares of the weight up to the end of each run of equal scores, from 0: [D, K + 1]."""
    total = drawn.sum(1, keepdims=True)
    sums = np.zeros((len(drawn), len(starts) + 1))
    if len(starts):
        np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1, out=sums[:, 1:])
    return np.asarray(sums / np.where(total > 0, total, np.nan))


def area(curve: Curve) -> Floats:
    """Area under the curve by trapezoids, [D]: ties count one half (Mann and Whitney, 1947;
    Hanley and McNeil, 1982). 0 to 1, chance 0.5.
    """
    heights = (curve.tpr[:, 1:] + curve.tpr[:, :-1]) / 2
    return np.asarray((np.diff(curve.fpr) * heights).sum(1) + _unknown(curve))


def area_above(curve: Curve, sensitivity: float) -> Floats:
    """Area under the curve and above `sensitivity`, [D]: 0 to `1 - sensitivity`.

    With 0.8 this is the metric of the ISIC 2024 challenge (ISIC-Research/Challenge-2024-Metrics,
    with the 0.8 of the competition), 0 to 0.2 and 0.02 for chance; it cuts the segment that crosses
    0.8 there, by linear interpolation, as the challenge does.
    """
    low, high = curve.tpr[:, :-1], curve.tpr[:, 1:]
    left, right = curve.fpr[:, :-1], curve.fpr[:, 1:]
    rise = high - low
    cut = np.clip(sensitivity - low, 0, rise)  # how much of the rise lies below
    entered = left + (right - left) * np.divide(cut, rise, out=np.zeros_like(cut), where=rise > 0)
    return np.asarray(((rise - cut) * (1 - (entered + right) / 2)).sum(1) + _unknown(curve))


def sensitivity_at(curve: Curve, specificity: float) -> Floats:
    """The highest sensitivity of a point of the curve with at least `specificity`, [D]."""
    return _best(curve.tpr, curve.fpr <= 1 - specificity + _ROUNDING, curve)


def specificity_at(curve: Curve, sensitivity: float) -> Floats:
    """The highest specificity of a point of the curve with at least `sensitivity`, [D]."""
    return _best(1 - curve.fpr, curve.tpr >= sensitivity - _ROUNDING, curve)


def _best(values: Floats, allowed: NDArray[np.bool_], curve: Curve) -> Floats:
    return np.asarray(np.where(allowed, values, 0.0).max(1) + _unknown(curve))


def _unknown(curve: Curve) -> Floats:
    """0, and NaN for a draw without both classes or of no pictures: [D]."""
    known = np.isfinite(curve.tpr[:, -1]) & np.isfinite(curve.fpr[:, -1])
    return np.where(known, 0.0, np.nan)
