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
    PROBABILITY_TOLERANCE,
    Case,
    Row,
    image_parity,
    image_rows,
    psnr,
)
from export.reference import Reference
from export.verify import FILES, engines, open_graph, pipeline

GOLDEN_DB: Final = 30.0
GOLDEN_MARGIN_DB: Final = 3.0
"""The golden image is for other machines, which round in other places, so less is asked of it than
was measured here; an image of another model or seed is at 10 to 15 dB."""


def whole(
    folder: Path, precisions: Sequence[str], checkpoint: Checkpoint, reference: Reference
) -> tuple[Parity, Golden, list[Row]]:
    """Every precision on every engine that may run it; `golden` is the first of the images."""
    images: dict[str, dict[str, ImageParity]] = {}
    classifier: dict[str, ClassifierParity] = {}
    rows: list[Row] = []
    first: list[float] = []
    for precision in precisions:
        images[precision] = {}
        for engine in engines(precision):
            made = pipeline(checkpoint, folder, engine, precision)[0].generate(reference.requests)
            ratios = [psnr(*pair) for pair in zip(made, reference.images, strict=True)]
            found = image_parity(ratios, reference.requests[0].steps, precision)
            images[precision][engine] = found
            rows += image_rows(found, precision, engine)
            first.append(ratios[0])
        graph = folder / "classifier" / FILES[precision]
        if graph.exists():
            more = _probabilities(checkpoint, graph, precision, reference.seen["classifier"])
            classifier[precision] = ClassifierParity(max(row.measured for row in more))
            rows += more
    golden = Golden(
        request=asdict(reference.requests[0]),
        image="golden.png",
        tolerance_db=min(GOLDEN_DB, float(math.floor(min(first) - GOLDEN_MARGIN_DB))),
    )
    return Parity(images, classifier), golden, rows


def _probabilities(
    checkpoint: Checkpoint, graph: Path, precision: str, cases: Sequence[Case]
) -> list[Row]:
    """The largest change of a probability of malignancy against the cases, on every engine."""
    spec = checkpoint.classifier
    assert spec is not None
    rows = []
    for engine in engines(precision):
        opened = open_graph(engine, graph, precision)
        pairs = [
            pair
            for case in cases
            for pair in zip(opened.run(case.inputs)["logits"], case.outputs["logits"], strict=True)
        ]
        change = max(
            abs(predict(found, spec).probability - predict(expected, spec).probability)
            for found, expected in pairs
        )
        bound = PROBABILITY_TOLERANCE[precision]
        rows.append(Row("probability", precision, engine, change, bound, "of change"))
    return rows
