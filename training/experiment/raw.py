"""A run's raw scores, and the figures that follow from them.

    >>> scores = Scores.read(Path("runs/experiment/scores/real_model_500_0_0.npz"))
    >>> calibration = calibrated(scores.where(scores.part == VAL))
    >>> measured(scores.where(scores.part == "test"), calibration)["auc"]
    0.7931

Conventions. `accuracy` is that of the more probable class, as the paper's must be. `threshold` is
the one that makes validation's balanced accuracy largest (of equal ones the middle), and
`balanced_accuracy`, `sensitivity` and `specificity` are at it. `brier` and `calibration_error` are
of probabilities after Platt's scaling on validation.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from training import metrics
from training.data import DatasetError
from training.figures import Floats
from training.raw_scores import probabilities

VAL: Final = "val"

Texts = NDArray[np.str_]


@dataclass(frozen=True)
class Scores:
    """Raw scores of a run, a row a picture [N].

    `part` is "val" or the test's name; `logits` [N, 2]; `border` and `masked` the malignant less
    the benign logit of the controls, NaN where there is none.
    """

    part: Texts
    picture: Texts
    group: Texts
    confirmed: Texts
    label: NDArray[np.int64]
    logits: Floats
    border: Floats
    masked: Floats

    def where(self, rows: NDArray[Any]) -> Scores:
        """The rows that are true [N], or of these numbers."""
        return Scores(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})

    def bytes(self) -> bytes:
        """As the file has it; equal scores make equal bytes."""
        stream = io.BytesIO()
        np.savez_compressed(stream, **{one.name: getattr(self, one.name) for one in fields(self)})
        return stream.getvalue()

    @classmethod
    def read(cls, file: Path) -> Scores:
        """What `bytes` gave.

        Raises:
            DatasetError: it is no such file.
        """
        try:
            with np.load(file, allow_pickle=False) as saved:
                return cls(**{one.name: saved[one.name] for one in fields(cls)})
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DatasetError(
                f"{file} holds no scores ({error}); delete its line in runs.jsonl, and the run is "
                "made again"
            ) from error


def calibrated(val: Scores) -> dict[str, float]:
    """Temperature, shift and threshold from validation's raw scores.

    The threshold is of the calibrated probability.

    Raises:
        DatasetError: a score is no number: the training diverged.
    """
    from training.scores import platt

    scale, shift = platt(val.logits, val.label)
    p = _probability(val.logits, scale, shift)
    return {"temperature": scale, "shift": shift, "threshold": threshold(p, val.label)}


def threshold(p: Floats, labels: NDArray[np.int64]) -> float:
    """The threshold of the largest balanced accuracy, halfway to the next lower score.

    Of several equally good ones the middle; where all scores are one, that score.
    """
    levels = np.unique(p)
    if len(levels) < 2:
        return float(levels[0])
    cuts = (levels[1:] + levels[:-1]) / 2
    found = np.array([metrics.balanced_accuracy(p >= cut, labels)[0] for cut in cuts])
    best = np.flatnonzero(found == found.max())
    return float(cuts[best[len(best) // 2]])


def measured(scores: Scores, calibration: Mapping[str, float]) -> dict[str, float]:
    """Every figure of one test; see the module's conventions."""
    p = _probability(scores.logits, calibration["temperature"], calibration["shift"])
    ranked, labels = difference(scores.logits), scores.label
    called = p >= calibration["threshold"]
    found = {
        "auc": metrics.auc(ranked, labels),
        "pauc": metrics.pauc(ranked, labels),
        "sensitivity_at_95_specificity": metrics.sensitivity_at_95_specificity(ranked, labels),
        "accuracy": metrics.accuracy(ranked > 0, labels),
        "balanced_accuracy": metrics.balanced_accuracy(called, labels),
        "sensitivity": metrics.sensitivity(called, labels),
        "specificity": metrics.specificity(called, labels),
        "brier": metrics.brier(p, labels),
        "calibration_error": metrics.calibration_error(p, labels),
    }
    return {name: float(value[0]) for name, value in found.items()}


def rounded(found: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON: six digits after the point, and nothing instead of NaN."""
    return {name: round(v, 6) if np.isfinite(v) else None for name, v in found.items()}


def _probability(logits: Floats, scale: float, shift: float) -> Floats:
    moved = logits + np.array([0.0, shift])
    return probabilities(moved, scale)


def difference(logits: Floats) -> Floats:
    """Malignant less benign logit, [N]."""
    return np.asarray(logits[:, 1] - logits[:, 0])
