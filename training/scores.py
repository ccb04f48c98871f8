"""What a classifier's scores are worth: calibration, threshold, AUC with interval, controls.

The controls tell lesion from camera: a score on the border alone (no lesion) and on pictures whose
lesion is painted over. A classifier that separates those has learnt where pictures come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dermaflux.prompt import LABELS
from training import data
from training.classifier import Recipe

Pixels = NDArray[np.uint8]


def platt(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Temperature and shift of the malignant logit that fit validation best (Platt, 1999).

    The shift matters as much as the temperature: half of every training batch is malignant, far
    more than among the pictures that will come.
    """
    difference = (logits[:, 1] - logits[:, 0])[:, None]
    fit = LogisticRegression(C=np.inf).fit(difference, labels)
    slope = max(float(fit.coef_[0, 0]), 0.05)  # a model that knows nothing has none
    return 1 / slope, float(fit.intercept_[0]) / slope


def probabilities(logits: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Probability of malignant, [N]."""
    difference = (logits[:, 1] - logits[:, 0]) / scale
    return np.asarray(1 / (1 + np.exp(-difference)))


def calibrate(
    logits: NDArray[np.float64], labels: NDArray[np.int64], scale: float, recipe: Recipe
) -> dict[str, Any]:
    """Threshold and abstention band from the validation split, with the temperature `scale`.

    The threshold is the highest that keeps `recipe.sensitivity` of the malignant lesions, rounded
    down to four digits; `validation` states what the written numbers give. The band
    holds the images nearest to it in rank, half on either side, so that `recipe.coverage` of the
    validation images get an answer.
    """
    scale = round(scale, 4)
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
        "validation": {
            "sensitivity": share(called[labels == 1]),
            "specificity": share(~called[labels == 0]),
            "images": len(p),
            "malignant": int(labels.sum()),
        },
    }


def share(chosen: NDArray[np.bool_]) -> float | None:
    """How many of [N] are true, to four digits; None of nothing."""
    return round(float(chosen.mean()), 4) if len(chosen) else None


def calibration_error(p: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error with equal-width bins."""
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [
        abs(p[index == b].mean() - labels[index == b].mean()) * np.mean(index == b)
        for b in range(bins)
        if np.any(index == b)
    ]
    return float(sum(gaps))


def auc(p: NDArray[np.float64], labels: NDArray[np.int64], draws: int = 1000) -> dict[str, Any]:
    """ROC-AUC with a 95 % bootstrap interval; both None, with a note, without both classes."""
    counts = {"images": len(p), "malignant": int(labels.sum())}
    if not 0 < counts["malignant"] < counts["images"]:
        note = "images of one class only: no AUC" if len(p) else "no images"
        return {"auc": None, "interval": None, **counts, "note": note}
    random = np.random.default_rng(0)
    values: list[float] = []
    while len(values) < draws:
        rows = random.integers(len(p), size=len(p))
        if 0 < labels[rows].sum() < len(rows):
            values.append(roc_auc_score(labels[rows], p[rows]))
    return {
        "auc": round(float(roc_auc_score(labels, p)), 4),
        "interval": [round(float(v), 4) for v in np.quantile(values, (0.025, 0.975))],
        **counts,
    }


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
    logits_of: Callable[[Pixels], NDArray[np.float64]], test: list[data.Sample],
    calibration: dict[str, Any], size: int,
) -> dict[str, Any]:  # fmt: skip
    """Every figure of the test splits, with the controls that tell lesion from camera.

    `logits_of` takes pictures [N, size, size, 3] and gives logits [N, 2]. The control with painted
    lesions is over the images that have a mask; every AUC states how many images it is over.
    """
    results: dict[str, Any] = {}
    for source in sorted({s.source for s in test}):
        chosen = [s for s in test if s.source == source]
        images = data.load_images(chosen, size)
        labels = np.array([LABELS.index(str(s.lesion.label)) for s in chosen])
        logits = logits_of(images)
        p = probabilities(logits, calibration["temperature"])
        low, high = calibration["abstain"]
        called = p >= calibration["threshold"]
        answered = (p < low) | (p >= high)
        figures: dict[str, Any] = {
            "whole": auc(p, labels),
            "sensitivity": share(called[labels == 1]),
            "specificity": share(~called[labels == 0]),
            "answered": share(answered),
            "calibration_error_uncalibrated": round(
                calibration_error(probabilities(logits - [0, calibration["shift"]], 1.0), labels), 4
            ),
            "calibration_error": round(calibration_error(p, labels), 4),
        }
        subsets = {"": np.ones(len(chosen), bool)}
        if any(s.confirmed for s in chosen):
            subsets["histology_"] = np.array([s.confirmed == "histo" for s in chosen])
            figures["histology"] = auc(p[subsets["histology_"]], labels[subsets["histology_"]])
        everywhere = np.ones(len(chosen), bool)
        for control, (changed, usable) in (
            ("border_only", (border_only(images), everywhere)),
            ("lesion_masked", lesion_masked(images, chosen)),
        ):
            q = probabilities(logits_of(changed), 1.0)
            for name, rows in subsets.items():
                figures[name + control] = auc(q[rows & usable], labels[rows & usable])
        results[source] = figures
    return results
