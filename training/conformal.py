"""Split-conformal sets: instead of one label, the labels that cannot be ruled out.

A set holds the true label of at least `1 - alpha` of the pictures of each class, if those to come
are like those of the calibration split: class-conditional (Mondrian) split conformal prediction
(Vovk et al., 2005; Sadinle et al., 2019), for a marginal promise would be kept on the many benign
lesions and broken on the malignant ones. On skin lesions: arXiv 2312.07460, 2503.23819. {benign,
malignant} says "not known", {} that neither label looks like those seen.

    >>> fitted = fit(probability, labels, alpha=0.1)
    >>> sets(probability, fitted)  # [N, 2]: benign in it, malignant in it

The promise is for pictures of the same sources, and for the average over calibration splits; what
the test split gives stands in the report, by source and by subgroup. Temperature and shift of the
same split do not weaken it, for they keep the order of the probabilities; a training stopped early
by that split does, a little, and so do several pictures of one lesion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.errors import DatasetError
from dermaflux.prompt import LABELS
from training import metrics
from training.figures import Floats
from training.roc import Labels

ALPHA: Final = 0.1  # share of each class whose set may lack the true label
NAMES: Final = (
    "coverage", "coverage_benign", "coverage_malignant", "mean_size", "only_benign",
    "only_malignant", "both", "none",
)  # fmt: skip
"""The figures of `figures`."""

_DIGITS: Final = 10_000


def quantile(scores: Floats, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores; infinite where n is too small for it.

    The finite-sample quantile of split conformal prediction (Papadopoulos et al., 2002;
    Angelopoulos and Bates, 2021, section 1.1).
    """
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def fit(probability: Floats, labels: Labels, alpha: float = ALPHA) -> dict[str, Any]:
    """Limits of the probability of malignant, from a calibration split: plain numbers for JSON.

    The score of a label is 1 less its probability. `benign` is in the set up to `benign_up_to`, and
    `malignant` from `malignant_from`; both are rounded outwards to four digits, which only makes
    sets larger. A class too small for `alpha` is in every set, and `note` says so.

    Raises:
        DatasetError: `alpha` is not between 0 and 1, or a probability is no number.
    """
    if not 0 < alpha < 1:
        raise DatasetError(f"alpha {alpha} is no share of errors; use 0 to 1, such as {ALPHA}")
    if not np.isfinite(probability).all():
        raise DatasetError(
            "probabilities of the validation split are no numbers; the training diverged: "
            "lower its learning rate"
        )
    own = {"benign": probability[labels == 0], "malignant": 1 - probability[labels == 1]}
    most = {name: min(quantile(scores, alpha), 1.0) for name, scores in own.items()}
    needed = math.ceil(1 / alpha - 1e-9) - 1
    small = [f"{len(own[name])} {name}" for name in LABELS if len(own[name]) < needed]
    fitted: dict[str, Any] = {
        "alpha": alpha,
        "benign_up_to": math.ceil(most["benign"] * _DIGITS) / _DIGITS,
        "malignant_from": math.floor((1 - most["malignant"]) * _DIGITS) / _DIGITS,
        "calibrated_on": {name: len(own[name]) for name in LABELS},
    }
    if small:
        fitted["note"] = f"{' and '.join(small)} are fewer than {needed}: in every set"
    return fitted


def sets(probability: Floats, fitted: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Whether benign (column 0) and malignant (column 1) are in each picture's set: [N, 2]."""
    low, high = fitted["benign_up_to"], fitted["malignant_from"]
    return np.stack([probability <= low, probability >= high], axis=1)


def figures(
    inside: NDArray[np.bool_], labels: Labels, weights: Floats | None = None
) -> dict[str, Floats]:
    """Coverage, mean size and the share of each kind of set, of `sets` [N, 2]: [D] each."""
    benign, malignant = inside.T
    held = inside[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "coverage": metrics.mean(held, weights),
        "coverage_benign": metrics.specificity(held == 0, labels, weights),
        "coverage_malignant": metrics.sensitivity(held == 1, labels, weights),
        "mean_size": metrics.mean(inside.sum(1).astype(np.float64), weights),
        "only_benign": metrics.mean((benign & ~malignant).astype(np.float64), weights),
        "only_malignant": metrics.mean((malignant & ~benign).astype(np.float64), weights),
        "both": metrics.mean((benign & malignant).astype(np.float64), weights),
        "none": metrics.mean((~benign & ~malignant).astype(np.float64), weights),
    }
