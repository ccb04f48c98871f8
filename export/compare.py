"""Whole images and probabilities of an exported folder, against eager torch at equal seeds.

>>> parity, golden, rows = whole(folder, ("fp32", "int8"), checkpoint, reference)
>>> parity.images["int8"]["openvino-cpu"].psnr_median_db
52.4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from dermaflux.bundle import ClassifierParity, Golden, ImageParity, Parity
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import predict
from export.parity import (
    AUC_TOLERANCE,
    PROBABILITY_TOLERANCE,
    PRUNED_AUC_TOLERANCE,
    Row,
    image_parity,
    image_rows,
    psnr,
    roc_auc,
)
from export.perceptual import Perceptual
from export.recipes import FILES, PRUNED
from export.reference import Reference
from export.verify import engines, open_graph, pipeline

GOLDEN_DB: Final = 30.0
GOLDEN_MARGIN_DB: Final = 3.0
"""The golden image is for other machines, which round in other places, so less is asked of it than
was measured here; an image of another model or seed is at 10 to 15 dB."""


def whole(
    folder: Path,
    precisions: Sequence[str],
    checkpoint: Checkpoint,
    reference: Reference,
    perceptual: Perceptual | None = None,
) -> tuple[Parity, Golden, list[Row]]:
    """Every precision on every engine that may run it; `golden` is the first of the images."""
    images: dict[str, dict[str, ImageParity]] = {}
    classifier: dict[str, ClassifierParity] = {}
    rows: list[Row] = []
    first: list[float] = []
    for precision in precisions:
        # The generator has no such file.
        drawn = () if precision == PRUNED else engines(precision)
        if drawn:
            images[precision] = {}
        for engine in drawn:
            made = pipeline(checkpoint, folder, engine, precision)[0].generate(reference.requests)
            perceived = perceptual(made, reference.images) if perceptual is not None else ()
            steps = reference.requests[0].steps
            found = image_parity(made, reference.images, steps, precision, perceived)
            images[precision][engine] = found
            rows += image_rows(found, precision, engine)
            first.append(psnr(made[0], reference.images[0]))
        graph = folder / "classifier" / FILES[precision]
        if graph.exists():
            classifier[precision], more = _probabilities(checkpoint, graph, precision, reference)
            rows += more
    golden = Golden(
        request=asdict(reference.requests[0]),
        image="golden.png",
        tolerance_db=min(GOLDEN_DB, float(math.floor(min(first) - GOLDEN_MARGIN_DB))),
    )
    return Parity(images, classifier), golden, rows


def _probabilities(
    checkpoint: Checkpoint, graph: Path, precision: str, reference: Reference
) -> tuple[ClassifierParity, list[Row]]:
    """The largest change of a probability of malignancy, and where the pictures have labels the
    area under the ROC curve: the worst over the engines. A pruned classifier is another one, so how
    far its probabilities are from the whole model's is told, and not held."""
    spec = checkpoint.classifier
    assert spec is not None
    cases = reference.seen["classifier"]
    labels = [picture.malignant for picture in reference.pictures]
    expected = [
        predict(logits, spec).probability for case in cases for logits in case.outputs["logits"]
    ]
    eager = roc_auc(expected, labels) if labels else None
    rows: list[Row] = []
    changes: list[float] = []
    areas: list[float] = []
    for engine in engines(precision):
        opened = open_graph(engine, graph, precision)
        found = [
            predict(logits, spec).probability
            for case in cases
            for logits in opened.run(case.inputs)["logits"]
        ]
        changes.append(max(abs(a - b) for a, b in zip(found, expected, strict=True)))
        bound = PROBABILITY_TOLERANCE.get(precision)
        if bound is not None:
            rows.append(Row("probability", precision, engine, changes[-1], bound, "of change"))
        if eager is not None:
            areas.append(roc_auc(found, labels))
            moved = abs(areas[-1] - eager)
            most = PRUNED_AUC_TOLERANCE if precision == PRUNED else AUC_TOLERANCE
            rows.append(Row("ROC area", precision, engine, moved, most, "of change"))
    worst = None if eager is None else max(areas, key=lambda area: abs(area - eager))
    return ClassifierParity(max(changes), len(expected), worst, eager), rows
