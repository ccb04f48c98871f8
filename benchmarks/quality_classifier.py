"""A bundle's classifier in every precision beside its reference, on photographs with labels.

    >>> pictures = photographs(Path("datasets/isic2017"), "test", None)
    >>> compared(bundle, classifiers(bundle), pictures)
    {"openvino-cpu int8": {"auc_change": 0.0001, "auc_change_95": [-0.0008, 0.0009], ...}}

Part of `python -m benchmarks.quality`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.similarity import auc, auc_change
from dermaflux import dataset
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier, Prediction
from dermaflux.engines import EAGER, Choice
from dermaflux.errors import DatasetError, EngineError
from dermaflux.images import decode_upload


@dataclass(frozen=True)
class Photograph:
    """A picture's file, its label, and the patient or lesion that it is of."""

    path: Path
    malignant: bool
    group: str


def photographs(folder: Path, split: str, most: int | None) -> list[Photograph]:
    """Those of a dataset's split, in order; with `most`, that many, evenly spread.

    Raises:
        DatasetError: there is no dataset, or its split lacks one of the two labels.
    """
    found = [
        Photograph(folder / one.file_name, one.label == "malignant", one.group)
        for one in dataset.read(folder)
        if one.split == split
    ]
    if most is not None and most < len(found):
        found = [found[index] for index in np.linspace(0, len(found) - 1, most).round().astype(int)]
    labels = {one.malignant for one in found}
    if labels != {True, False}:
        raise DatasetError(
            f"{folder} has {len(found)} photographs in its split {split!r}, "
            f"{sum(one.malignant for one in found)} of them malignant; an AUC needs both labels"
        )
    return found


def compared(
    bundle: Bundle,
    variants: Sequence[Choice],
    pictures: Sequence[Photograph],
    checkpoint: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Variants of the classifier beside the reference: eager torch with the weights of
    `checkpoint`, or the first of them in fp32.

    Raises:
        BundleError: the checkpoint has no classifier.
        EngineError: no engine runs it, or there is no reference.
        ImageError: a photograph cannot be read.
    """
    choices = {f"{one.engine} {one.precision}": one for one in variants}
    opened = {
        name: Classifier.open(bundle, one.engine, one.precision, threads=threads)
        for name, one in choices.items()
    }
    reference = next((name for name, one in choices.items() if one.precision == "fp32"), None)
    if checkpoint is not None:
        reference = EAGER
        eager = Classifier.open(bundle, EAGER, checkpoint=checkpoint, threads=threads)
        opened = {EAGER: eager, **opened}
    if reference is None:
        raise EngineError(
            f"{bundle.path} has no fp32 classifier that runs here to compare with; name the "
            "weights with --checkpoint"
        )
    told: dict[str, list[Prediction]] = {name: [] for name in opened}
    size = bundle.limits.max_batch
    for start in range(0, len(pictures), size):
        chunk = pictures[start : start + size]
        # What is made ready is the same for all: of one bundle, with one gate.
        ready = [opened[reference].prepare(decode_upload(one.path.read_bytes())) for one in chunk]
        for name, classifier in opened.items():
            told[name] += [one.prediction for one in classifier.judge(ready)]
        if start // size % 10 == 0:
            print(f"{start + len(chunk)} of {len(pictures)} photographs", file=sys.stderr)
    gated = opened[reference].intake is not None
    return {
        "reference": reference,
        "photographs": len(pictures),
        "malignant": sum(one.malignant for one in pictures),
        "groups": len({one.group for one in pictures}),
        "variants": {
            name: beside(found, told[reference], pictures, gated) for name, found in told.items()
        },
    }


def beside(
    found: Sequence[Prediction],
    reference: Sequence[Prediction],
    pictures: Sequence[Photograph],
    gated: bool,
) -> dict[str, Any]:
    """AUC and its change with a 95 % interval, changes of probabilities, and what they decided."""
    ours = np.array([one.probability for one in found])
    base = np.array([one.probability for one in reference])
    malignant = np.array([one.malignant for one in pictures])
    change, low, high = auc_change(ours, base, malignant, [one.group for one in pictures])
    moved = np.abs(ours - base)
    pairs = list(zip(found, reference, strict=True))
    return {
        "auc": round(float(auc(ours, malignant)), 5),
        "auc_change": round(change, 5),
        "auc_change_95": [round(low, 5), round(high, 5)],
        "probability_change_median": round(float(np.median(moved)), 6),
        "probability_change_p99": round(float(np.quantile(moved, 0.99)), 6),
        "probability_change_most": round(float(moved.max()), 6),
        "labels_changed": sum(one.label != other.label for one, other in pairs),
        "decisions_changed": sum(one.decision != other.decision for one, other in pairs),
        "gate_changed": sum(a.accepted != b.accepted for a, b in pairs) if gated else None,
    }
