"""A threshold for a wanted sensitivity, from the pictures at hand, and what it may give elsewhere.

A threshold set on other people's lesions rarely keeps its sensitivity on one's own. This takes the
highest threshold that keeps enough of the malignant pictures here, and says how much of that is
chance: in each bootstrap draw of lesions a threshold is set anew, and judged on the lesions that
the draw left out (Efron, 1983), which it was not set by.

    >>> found = suggested(raw, 0.95)
    >>> found["threshold"], found["on_others"]["sensitivity"]
    ({'value': 0.061, 'interval': [0.041, 0.093]}, {'value': 0.93, 'interval': [0.84, 0.99]})
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training import bootstrap, metrics, roc
from training.evaluation import unranked
from training.figures import Floats
from training.raw_scores import RawScores

_DIGITS: Final = 10_000
_ROUNDING: Final = 1e-9  # as in `training.roc`
_FIGURES: Final = ("threshold", "sensitivity", "specificity")


def suggested(raw: RawScores, wanted: float, draws: int = bootstrap.DRAWS) -> dict[str, Any]:
    """The highest threshold with a sensitivity of `wanted` (0 to 1) or more on `raw`, rounded down.

    `sensitivity` and `specificity` are those of the written threshold on these pictures;
    `on_others` has the means of both over the lesions that draws left out, where the threshold is
    the draw's own, with the middle 95 % of draws. What has no value is None, and `note` says why.
    """
    p, labels = raw.probability, raw.label
    counts = {"images": len(raw), "malignant": int(labels.sum())}
    found: dict[str, Any] = {"wanted_sensitivity": wanted, **counts}
    found["groups"] = len(np.unique(raw.group))
    if note := unranked(p, labels):
        nothing = bootstrap.nothing(_FIGURES, note)
        others = bootstrap.nothing(_FIGURES[1:], note)
        return found | nothing | {"on_others": others, "note": note}
    least = math.ceil(1 / (1 - wanted) - _ROUNDING) if wanted < 1 else math.inf
    if counts["malignant"] < least:
        found["note"] = (
            f"{counts['malignant']} malignant pictures are too few to lose one at a sensitivity "
            f"of {wanted:g}: the threshold is the lowest of their probabilities"
        )
    at = float(_thresholds(raw, wanted, None)[0])
    entry = bootstrap.measured(
        lambda w: {"threshold": _thresholds(raw, wanted, w)}, raw.group, draws
    )
    called = p >= at
    kept = bootstrap.measured(
        lambda w: {
            "sensitivity": metrics.sensitivity(called, labels, w),
            "specificity": metrics.specificity(called, labels, w),
        },
        raw.group, draws,
    )  # fmt: skip
    return found | entry | kept | {"on_others": _on_others(raw, wanted, draws)}


def _thresholds(raw: RawScores, wanted: float, weights: Floats | None) -> Floats:
    """The highest threshold of each draw that keeps `wanted`, rounded down: [D]."""
    curve = roc.roc(raw.probability, raw.label, weights)
    enough = curve.tpr >= wanted - _ROUNDING
    first = curve.thresholds[enough.argmax(1)]
    # Rounded up it would lose the very lesion that it was set by.
    return np.where(enough.any(1), np.floor(first * _DIGITS) / _DIGITS, np.nan)


def _on_others(raw: RawScores, wanted: float, draws: int) -> dict[str, Any]:
    parts: dict[str, list[Floats]] = {"sensitivity": [], "specificity": []}
    for weights in bootstrap.drawn(raw.group, draws):
        out = weights == 0
        called = raw.probability >= _thresholds(raw, wanted, weights)[:, None]
        parts["sensitivity"].append(_share(called, out & (raw.label == 1)))
        parts["specificity"].append(_share(~called, out & (raw.label == 0)))
    return {name: _middle(np.concatenate(values)) for name, values in parts.items()}


def _share(called: NDArray[np.bool_], among: NDArray[np.bool_]) -> Floats:
    """How many of `among` are called so, in each draw: [D]."""
    count = among.sum(1)
    return np.asarray((called & among).sum(1) / np.where(count > 0, count, np.nan))


def _middle(values: Floats) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    if len(known) < len(values) / 2:
        return {"value": None, "interval": None, "note": "too few lesions are left out of draws"}
    interval = [bootstrap.rounded(float(v)) for v in np.quantile(known, (0.025, 0.975))]
    return {"value": bootstrap.rounded(float(known.mean())), "interval": interval}
