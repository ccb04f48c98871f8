"""What a classifier's scores are worth: calibration, threshold, abstention, and the report.

    >>> scale, shift = platt(logits, labels)
    >>> calibration = calibrate(logits, labels, scale, recipe)  # of the validation split alone
    >>> figures = report(logits_of, test, calibration, 128, validation=val, out=folder)

The figures are computed from the raw scores by `training.evaluation`; with `out` those scores are
kept in `scores.csv`, and plots of them in `plots/`. The controls tell lesion from camera: a score
on the border alone (no lesion) and on pictures whose lesion is painted over. A classifier that
separates those has learnt where pictures come from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression

from dermaflux.errors import DatasetError
from training import bootstrap, conformal, data, evaluation, metrics
from training.evaluation import brief, share
from training.figures import Pixels
from training.raw_scores import RawScores, probabilities
from training.recipe import Recipe

__all__ = [
    "auc",
    "border_only",
    "brief",
    "calibrate",
    "calibration_error",
    "lesion_masked",
    "platt",
    "probabilities",
    "report",
    "share",
    "significant",
]

SCORES = "scores.csv"
PLOTS = "plots"
LEAST_SLOPE: Final = 0.05
"""Of the calibrated logit, over a standard deviation of the model's."""

log = logging.getLogger(__name__)


def platt(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Temperature and shift of the malignant logit that fit validation best (Platt, 1999).

    The shift matters as much as the temperature: half of every training batch is malignant, far
    more than among the pictures that will come. The targets are Platt's, (N+ + 1) / (N+ + 2) for
    malignant and 1 / (N- + 2) for benign, so that scores that part the classes wholly have a
    temperature too. A slope below `LEAST_SLOPE` (a model that knows nothing, or the contrary) is
    taken as that, with a warning and the shift that makes the mean probability the share of
    malignant pictures.

    Raises:
        DatasetError: a logit is no number, or there are not both classes.
    """
    _sound(logits, labels)
    difference = logits[:, 1] - logits[:, 0]
    middle, spread = float(difference.mean()), float(difference.std())
    if spread <= 1e-9 * np.abs(difference).max():  # all are one score, but for rounding
        spread = 1.0
    # Both labels of every picture, weighted: the targets are shares.
    counts = np.bincount(labels, minlength=2)
    target = np.where(labels == 1, (counts[1] + 1) / (counts[1] + 2), 1 / (counts[0] + 2))
    fit = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile((difference - middle) / spread, 2)[:, None],
        np.repeat([1, 0], len(labels)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(fit.coef_[0, 0])
    if slope >= LEAST_SLOPE:
        scale = spread / slope
        return scale, float(fit.intercept_[0]) * scale - middle
    log.warning(
        "validation shows no signal: over %d pictures the slope of the calibration is %.4g, and %g "
        "is taken; probabilities will say little more than how many pictures are malignant",
        len(labels), slope, LEAST_SLOPE,
    )  # fmt: skip
    scale = spread / LEAST_SLOPE
    return scale, _shift(difference, scale, float(labels.mean()))


def _shift(difference: NDArray[np.float64], scale: float, wanted: float) -> float:
    """The shift at which the mean probability at `scale` is `wanted`, between 0 and 1."""
    edge = scale * math.log(wanted / (1 - wanted))
    low, high = edge - float(difference.max()), edge - float(difference.min())
    for _ in range(100):
        middle = (low + high) / 2
        p = probabilities(np.stack([0 * difference, difference + middle], 1), scale)
        low, high = (middle, high) if p.mean() < wanted else (low, middle)
    return (low + high) / 2


def significant(value: float, digits: int = 5) -> float:
    """`value` in so many digits that say something: a small temperature never becomes 0."""
    return float(f"{value:.{digits}g}")


def calibrate(
    logits: NDArray[np.float64], labels: NDArray[np.int64], scale: float, recipe: Recipe,
    alpha: float = conformal.ALPHA,
) -> dict[str, Any]:  # fmt: skip
    """Threshold, abstention band and conformal limits from the validation split at `scale`.

    The threshold is the highest that keeps `recipe.sensitivity` of the malignant lesions, rounded
    down to four digits; `validation` states what the written numbers give. The band
    holds the images nearest to it in rank, half on either side, so that `recipe.coverage` of the
    validation images get an answer. `conformal` are the limits of `training.conformal`, whose sets
    lack the true label of at most `alpha` of each class.

    Raises:
        DatasetError: a logit is no number, or there are not both classes.
    """
    _sound(logits, labels)
    scale = significant(scale)
    p = probabilities(logits, scale)
    threshold = float(np.quantile(p[labels == 1], 1 - recipe.sensitivity, method="lower"))
    at = float(np.mean(p < threshold))
    half = (1 - recipe.coverage) / 2
    low = float(np.quantile(p, max(at - half, 0.0)))
    high = float(np.quantile(p, min(at + half, 1.0)))
    # Rounded outwards: a threshold rounded up would lose the very lesion that it was set by.
    written = math.floor(threshold * 10_000) / 10_000
    called = p >= written
    return {
        "temperature": scale,
        "threshold": written,
        "abstain": [
            math.floor(min(low, written) * 10_000) / 10_000,
            math.ceil(max(high, threshold) * 10_000) / 10_000,
        ],
        "conformal": conformal.fit(p, labels, alpha),
        "validation": {
            "sensitivity": share(called[labels == 1]),
            "specificity": share(~called[labels == 0]),
            "images": len(p),
            "malignant": int(labels.sum()),
        },
    }


def _sound(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> None:
    if bad := int((~np.isfinite(logits).all(1)).sum()):
        raise DatasetError(
            f"{bad} of {len(logits)} validation pictures have scores that are no numbers: the "
            "training diverged; lower its learning rate"
        )
    if len(np.unique(labels)) < 2:
        raise DatasetError(
            f"the {len(labels)} validation pictures are of one class; calibration needs both"
        )


def calibration_error(
    p: NDArray[np.float64], labels: NDArray[np.int64], bins: int = metrics.BINS
) -> float:
    """Expected calibration error over bins of equal mass (`metrics.calibration_error`)."""
    return float(metrics.calibration_error(p, labels, bins=bins)[0])


def auc(
    p: NDArray[np.float64], labels: NDArray[np.int64], draws: int = bootstrap.DRAWS,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:  # fmt: skip
    """ROC-AUC with a 95 % bootstrap interval over `groups` [N] (without them, over pictures).

    Both are None, with a note, without both classes.
    """
    names = np.arange(len(p)) if groups is None else np.asarray(groups)
    found = evaluation.ranked(p, labels, names, draws)
    return {name: value for name, value in found.items() if name != "metrics"}


def border_only(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep 3 / 32 of the picture at each edge, and paint the rest in that edge's mean colour.

    What is left is mostly the camera; nothing of it depends on what stood in the middle.
    """
    edge = 3 * images.shape[1] // 32
    rim = np.ones(images.shape[1:3], bool)
    rim[edge:-edge, edge:-edge] = False
    kept = images.copy()
    kept[:, ~rim] = images[:, rim].mean(axis=1, keepdims=True).astype(np.uint8)
    return kept


def lesion_masked(
    images: NDArray[np.uint8], samples: list[data.Sample]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paint every lesion, a little beyond its mask, in the colour of the skin around it.

    Returns the pictures, and which were painted, [N]: those with a mask that leaves skin around.
    """
    painted, done = images.copy(), np.zeros(len(images), bool)
    for row, (image, sample) in enumerate(zip(painted, samples, strict=True)):
        if sample.mask is None:
            continue
        with Image.open(sample.mask) as mask:
            grown = mask.convert("L").resize(image.shape[1::-1]).filter(ImageFilter.MaxFilter(7))
        inside = np.asarray(grown) > 127
        if inside.any() and not inside.all():
            image[inside] = np.median(image[~inside], axis=0)
            done[row] = True
    return painted, done


def report(
    logits_of: Callable[[Pixels], NDArray[np.float64]], test: Sequence[data.Sample],
    calibration: dict[str, Any], size: int, *, validation: Sequence[data.Sample] = (),
    out: Path | None = None, draws: int = bootstrap.DRAWS,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the test pictures by source, with the controls that tell lesion from camera.

    `logits_of` takes pictures [N, size, size, 3] and gives logits [N, 2]. The control with painted
    lesions is over the images that have a mask; every AUC states how many images it is over. With
    `out`, the raw scores of `test` and `validation` are written to `scores.csv` there and plots to
    `plots/`; a `report.json` that is there is of other scores and is removed.

    Raises:
        DatasetError: a picture or mask cannot be read.
    """
    tested = scored(logits_of, test, calibration, size, "test", controls=True)
    figures = evaluation.figures(tested, calibration, draws)
    if out is not None:
        from training import plots

        parts = [tested]
        if validation:
            parts.append(scored(logits_of, validation, calibration, size, "val"))
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").unlink(missing_ok=True)
        RawScores.joined(parts).write(out / SCORES)
        plots.save(out / PLOTS, tested, figures, calibration)
    return figures


def scored(
    logits_of: Callable[[Pixels], NDArray[np.float64]], samples: Sequence[data.Sample],
    calibration: dict[str, Any], size: int, split: str, *, controls: bool = False,
) -> RawScores:  # fmt: skip
    """The raw scores of samples, a source after the other; `split` is what they are used as."""
    parts: list[RawScores] = []
    for source in sorted({s.source for s in samples}):
        chosen = [s for s in samples if s.source == source]
        images = data.load_images(chosen, size)
        raw = RawScores.of(chosen, logits_of(images), calibration)
        if controls:
            border = _difference(logits_of(border_only(images)))
            painted, done = lesion_masked(images, chosen)
            masked = np.where(done, _difference(logits_of(painted)), np.nan)
            raw = replace(raw, border_only=border, lesion_masked=masked)
        parts.append(replace(raw, split=np.full(len(chosen), split)))
    return RawScores.joined(parts) if parts else RawScores.of([], np.zeros((0, 2)), calibration)


def _difference(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits[:, 1] - logits[:, 0])
