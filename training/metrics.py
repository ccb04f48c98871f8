"""Figures of a classifier of two classes: pure functions of scores and labels.

Each takes `scores` [N], `labels` [N] (1 malignant) and how often each picture counts, `weights`
[D, N], for D bootstrap draws at once (without them, once each, D = 1), and gives [D]; NaN where a
draw defines no value (one class alone, no picture, a score that is NaN).

    >>> auc(probability, labels)
    array([0.86])
    >>> mcc(probability >= threshold, labels)
    array([0.41])

Three kinds of scores: any that rank (`auc`, `pauc`, ...); probabilities (`brier`, `log_loss`,
`calibration_error`); and at a threshold what was called malignant, True or False (`accuracy`, ...).
Intervals are `training.bootstrap`'s. As a command it recomputes a classifier's report from its raw
scores, and says whether the report holds the same:

    python -m training.metrics models/mini/classifier/scores.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training import roc
from training.figures import Floats
from training.roc import Labels

Metric = Callable[[Any, Labels, Floats | None], Floats]
Called = NDArray[np.bool_]

BINS: Final = 15  # Guo et al., 2017
HIGH: Final = 0.95  # the sensitivity or specificity that is held while the other is read off
ABOVE: Final = 0.8  # ISIC 2024: the part of the curve above this sensitivity


def auc(scores: Floats, labels: Labels, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve; ties count one half (`roc.area`)."""
    return roc.area(roc.roc(scores, labels, weights))


def pauc(scores: Floats, labels: Labels, weights: Floats | None = None) -> Floats:
    """The ISIC 2024 challenge's area above 80 % sensitivity, 0 to 0.2 (`roc.area_above`)."""
    return roc.area_above(roc.roc(scores, labels, weights), ABOVE)


def sensitivity_at_95_specificity(
    scores: Floats, labels: Labels, weights: Floats | None = None
) -> Floats:
    """Highest sensitivity among thresholds of 95 % specificity or more, on these pictures.

    The threshold is chosen anew in each draw and on the pictures it is judged by: it says what the
    ranking allows, not what a threshold set elsewhere will give.
    """
    return roc.sensitivity_at(roc.roc(scores, labels, weights), HIGH)


def specificity_at_95_sensitivity(
    scores: Floats, labels: Labels, weights: Floats | None = None
) -> Floats:
    """Highest specificity among thresholds of 95 % sensitivity or more; chosen as above."""
    return roc.specificity_at(roc.roc(scores, labels, weights), HIGH)


def ranking(scores: Floats, labels: Labels, weights: Floats | None = None) -> dict[str, Floats]:
    """All four figures of a ranking, of one curve."""
    curve = roc.roc(scores, labels, weights)
    return {
        "auc": roc.area(curve),
        "pauc": roc.area_above(curve, ABOVE),
        "sensitivity_at_95_specificity": roc.sensitivity_at(curve, HIGH),
        "specificity_at_95_sensitivity": roc.specificity_at(curve, HIGH),
    }


def accuracy(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Share of pictures called what they are."""
    tp, fp, fn, tn = _confusion(called, labels, weights)
    return _over(tp + tn, tp + fp + fn + tn)


def sensitivity(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Share of the malignant pictures that were called so."""
    tp, _, fn, _ = _confusion(called, labels, weights)
    return _over(tp, tp + fn)


def specificity(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Share of the benign pictures that were called so."""
    _, fp, _, tn = _confusion(called, labels, weights)
    return _over(tn, tn + fp)


def balanced_accuracy(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Mean of sensitivity and specificity (Brodersen et al., 2010); the ISIC 2018 challenge's."""
    of = (called, labels, weights)
    return np.asarray((sensitivity(*of) + specificity(*of)) / 2)


def mcc(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Correlation of call and label, -1 to 1 (Matthews, 1975); NaN where all are called alike."""
    tp, fp, fn, tn = _confusion(called, labels, weights)
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return _over(tp * tn - fp * fn, np.sqrt(margins))


def f1(called: Called, labels: Labels, weights: Floats | None = None) -> Floats:
    """Harmonic mean of precision and sensitivity, 2 TP / (2 TP + FP + FN) (Rijsbergen, 1979)."""
    tp, fp, fn, _ = _confusion(called, labels, weights)
    return _over(2 * tp, 2 * tp + fp + fn)


def decided(called: Called, labels: Labels, weights: Floats | None = None) -> dict[str, Floats]:
    """All six figures of a threshold."""
    of = (called, labels, weights)
    return {
        "accuracy": accuracy(*of),
        "balanced_accuracy": balanced_accuracy(*of),
        "sensitivity": sensitivity(*of),
        "specificity": specificity(*of),
        "mcc": mcc(*of),
        "f1": f1(*of),
    }


def brier(probability: Floats, labels: Labels, weights: Floats | None = None) -> Floats:
    """Mean squared error of the probability of malignant, 0 to 1 (Brier, 1950, halved as usual)."""
    return mean((probability - labels) ** 2, weights)


def log_loss(probability: Floats, labels: Labels, weights: Floats | None = None) -> Floats:
    """Mean negative log-likelihood in nats (Good, 1952).

    Probabilities are kept 2.2e-16 away from 0 and 1, as scikit-learn does: a wrong certainty costs
    36, not infinity.
    """
    least = np.finfo(np.float64).eps
    p = np.clip(probability, least, 1 - least)
    return mean(-np.where(labels == 1, np.log(p), np.log1p(-p)), weights)


def calibration_error(
    probability: Floats, labels: Labels, weights: Floats | None = None, bins: int = BINS
) -> Floats:
    """Expected calibration error (Naeini et al., 2015), bins of equal mass (Nixon et al., 2019).

    The mean over pictures of |mean probability - share of malignant| of their bin. Bins hold about
    as many pictures each, so that few are nearly empty; equal probabilities share a bin. Bins are
    cut on the pictures as they are, and kept in the draws. Chance alone gives some error, and draws
    are noisier than the pictures: the interval lies high, and is no test of a perfect calibration.
    """
    if not len(probability) or np.isnan(probability).any():
        return np.full(1 if weights is None else len(weights), np.nan)
    weights = np.ones((1, len(probability))) if weights is None else weights
    inside = np.eye(bins)[binned(probability, bins)]
    gaps = np.abs((weights * (probability - labels)) @ inside)
    return _over(gaps.sum(1), weights.sum(1))


def binned(probability: Floats, bins: int = BINS) -> NDArray[np.intp]:
    """Which of `bins` bins of equal mass each probability is in, [N]; equal ones are together."""
    edges = np.quantile(probability, np.arange(1, bins) / bins, method="inverted_cdf")
    return np.searchsorted(edges, probability, side="left")


def expected(
    probability: Floats, labels: Labels, weights: Floats | None = None
) -> dict[str, Floats]:
    """All three figures of probabilities."""
    of = (probability, labels, weights)
    return {
        "brier": brier(*of),
        "log_loss": log_loss(*of),
        "calibration_error": calibration_error(*of),
    }


def mean(values: NDArray[Any], weights: Floats | None = None) -> Floats:
    """Weighted mean of `values` [N] in each draw, [D]; NaN of nothing."""
    weights = np.ones((1, len(values))) if weights is None else weights
    return _over(weights @ values, weights.sum(1))


UNDEFINED: Final[Mapping[str, str]] = {
    "mcc": "all pictures are called alike, or are of one class",
    "f1": "no malignant picture, and none called so",
    "sensitivity": "no malignant picture",
    "specificity": "no benign picture",
}
"""Why a figure has no value, where it is not the want of a class or of pictures."""


def _confusion(
    called: Called, labels: Labels, weights: Floats | None
) -> tuple[Floats, Floats, Floats, Floats]:
    """Weight of true and false positives, false and true negatives: [D] each."""
    weights = np.ones((1, len(labels))) if weights is None else weights
    yes, malignant = np.asarray(called, bool), labels == 1
    cells = np.stack([yes & malignant, yes & ~malignant, ~yes & malignant, ~yes & ~malignant], 1)
    tp, fp, fn, tn = (weights @ cells.astype(np.float64)).T
    return tp, fp, fn, tn


def _over(above: Floats, below: Floats) -> Floats:
    return np.asarray(above / np.where(below > 0, below, np.nan))


if __name__ == "__main__":
    from training.recount import main

    sys.exit(main())
