"""The figures of a classifier for the people and lesions that a mean over all would hide.

By age band, sex, site, Fitzpatrick skin type, how the label is known, and diagnosis; each source
stands for itself already, for pooled sources compare cameras. A figure is given where its class has
at least ten pictures, and groups below that are listed with their counts, so that nobody takes an
empty table for an even one.

    >>> figures(raw, calibration)["sex"]["female"]
    {'images': 280, 'malignant': 51, 'groups': 271, 'auc': {'value': 0.84, 'interval': [...]}, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from dermaflux.prompt import LABELS
from training import bootstrap, conformal, metrics
from training.figures import Floats
from training.raw_scores import RawScores, Texts

LEAST: Final = 10  # pictures of a class, below which its figures are noise
UNKNOWN: Final = "unknown"
_BANDS: Final = (
    (0, "under 30"),
    (30, "30 to 44"),
    (45, "45 to 59"),
    (60, "60 to 74"),
    (75, "75 on"),
)

_ORDER: Final = {name: place for place, (_, name) in enumerate(_BANDS)} | {UNKNOWN: len(_BANDS)}


def figures(
    raw: RawScores, calibration: Mapping[str, Any], draws: int = bootstrap.DRAWS
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by attribute and its value; an attribute that no picture has is left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, column in columns(raw).items():
        values = sorted(np.unique(column).tolist(), key=lambda value: _ORDER.get(value, 0))
        if values and values != [UNKNOWN]:
            found[name] = {v: _group(raw.where(column == v), calibration, draws) for v in values}
    return found


def columns(raw: RawScores) -> dict[str, Texts]:
    """Which group each picture is in, [N], by attribute; `unknown` where nobody says."""
    named = {
        "age": _bands(raw.age),
        "sex": raw.sex,
        "site": raw.site,
        "skin_type": raw.skin_type,
        "confirmed": raw.confirmed,
        "diagnosis": raw.diagnosis,
    }
    return {name: np.where(column == "", UNKNOWN, column) for name, column in named.items()}


def _bands(age: Floats) -> Texts:
    starts, names = np.array([band[0] for band in _BANDS]), np.array([band[1] for band in _BANDS])
    # NaN is sorted behind all bands, and then put aside.
    inside = names[np.searchsorted(starts, age, side="right") - 1]
    return np.where(np.isnan(age), "", inside)


def _group(raw: RawScores, calibration: Mapping[str, Any], draws: int) -> dict[str, Any]:
    labels, p = raw.label, raw.probability
    count = {"benign": int((labels == 0).sum()), "malignant": int((labels == 1).sum())}
    enough = {name: count[name] >= LEAST for name in LABELS}
    found: dict[str, Any] = {
        "images": len(raw),
        "malignant": count["malignant"],
        "groups": len(np.unique(raw.group)),
    }
    if not np.isfinite(p).all():
        return found | {"note": "some scores are no numbers"}
    if not any(enough.values()):
        return found | {"note": f"too small: fewer than {LEAST} pictures of either class"}
    called = p >= calibration["threshold"]
    abstained = (raw.decision == "abstain").astype(np.float64)
    fitted = calibration.get("conformal")
    inside = None if fitted is None else conformal.sets(p, fitted)
    needs = {
        "auc": LABELS, "sensitivity": ("malignant",), "specificity": ("benign",),
        "coverage_benign": ("benign",), "coverage_malignant": ("malignant",),
    }  # fmt: skip
    few = {name: [c for c in classes if not enough[c]] for name, classes in needs.items()}

    def statistics(weights: Floats | None) -> dict[str, Floats]:
        given = {
            "sensitivity": metrics.sensitivity(called, labels, weights),
            "specificity": metrics.specificity(called, labels, weights),
            "abstained": metrics.mean(abstained, weights),
        }
        if all(enough.values()):
            given = {"auc": metrics.auc(p, labels, weights)} | given
        if inside is not None:
            given |= conformal.figures(inside, labels, weights)
        return {name: value for name, value in given.items() if not few.get(name)}

    figures_ = bootstrap.measured(statistics, raw.group, draws)
    asked = ["auc", "sensitivity", "specificity"]
    asked += [] if inside is None else ["coverage_benign", "coverage_malignant"]
    for name in (one for one in asked if few[one]):
        said = " and ".join(f"{count[c]} {c}" for c in few[name])
        figures_ |= bootstrap.nothing((name,), f"too few: {said}, and {LEAST} are needed")
    sets_ = {name: figures_.pop(name) for name in list(figures_) if name in conformal.NAMES}
    return found | figures_ | ({"conformal": sets_} if sets_ else {})
