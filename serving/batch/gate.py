"""The quality gate: may this picture stand in a data set as what was asked for?

Four questions. Does the classifier say the asked label? Is a lesion seen, of the asked size and in
the asked colours? Is it a copy of a picture that the generator saw? (The fourth, whether it is a
copy of another picture of the job, is asked at the end: `serving.batch.copies`.) All that was
measured is kept with the verdict, whether it decides or not, so that other thresholds can be tried
on the numbers. What a verdict says depends on the picture and what was asked alone.

    >>> gate = Gate(Thresholds(), Classifier.open("bundles/mini"), Index.load(Path("seen.npz")))
    >>> gate.judge([item], [pixels])[0].reasons
    ('the classifier says malignant (0.2451 malignant), asked was benign',)

A gate selects: what the classifier and the measures cannot see or judge wrongly is selected too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux.classifier import Classifier
from dermaflux.duplicates import first, nearest
from dermaflux.errors import DatasetError
from dermaflux.prompt import Lesion
from dermaflux.thumbnails import Index
from serving.batch.items import Item
from serving.batch.thresholds import DECISION, OFF, STEPS, Thresholds

__all__ = ["Gate", "Thresholds", "Verdict"]

Pixels = NDArray[np.uint8]
_DIGITS: Final = 4
"""Of what is measured. The rounded numbers decide, so that a record can be judged again; and the
last bits of a matrix product, which may depend on the other rows, do not."""


@dataclass(frozen=True)
class Verdict:
    """Why a picture is rejected, in sentences (none: it passes), and all that was measured.

    `measures` has, as far as the gate looks: `probability` of malignancy and `decision`; `found`,
    `area`, `diameter`, `asymmetry`, `compactness`, `touch`, `contrast`, `shares` of colours, and
    the words `size`, `asymmetry_word`, `border_word`, `color_words` (see
    `dermaflux.attributes.Measured`); `nearest`, the name of the most similar picture of the index
    (None for a flat picture), and its `similarity`, 0 to 1. Numbers have four digits; all of it is
    JSON.
    """

    reasons: tuple[str, ...]
    measures: dict[str, Any]


class Gate:
    """Thresholds with what measures: a classifier, the index of pictures seen in training.

    Raises:
        DatasetError: the thresholds ask for a classifier, or for scikit-image, which is not there.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        classifier: Classifier | None = None,
        index: Index | None = None,
    ) -> None:
        if classifier is None and thresholds.agreement != OFF:
            raise DatasetError(
                "the gate asks a classifier, and the bundle has none; turn that off with "
                f"`agreement: {OFF}` in the file of --gate, or export a checkpoint that has "
                "classifier/"
            )
        self.thresholds = thresholds
        self._classifier = classifier
        self._index = index if index is not None and len(index) else None
        self._first = None if self._index is None else first(self._index)
        self._attributes = None if thresholds.attributes is None else _attributes()

    def judge(self, items: Sequence[Item], pixels: Sequence[Pixels]) -> list[Verdict]:
        """A verdict on each picture, uint8 [H, W, 3], of the item at the same place.

        Raises:
            EngineError: the classifier's engine failed.
        """
        measured = [self._measured(one) for one in pixels]
        return [
            Verdict(reasons(self.thresholds, item.lesion, measures), measures)
            for item, measures in zip(items, measured, strict=True)
        ]

    def _measured(self, pixels: Pixels) -> dict[str, Any]:
        image = Image.fromarray(pixels)
        measures: dict[str, Any] = {}
        if self._classifier is not None:
            # One by one: some engines give other last bits in a batch, and it costs half a
            # millisecond a picture.
            (said,) = self._classifier.classify([image])
            measures["probability"] = round(said.probability, _DIGITS)
            measures["decision"] = said.decision
        if self._attributes is not None:
            seen = self._attributes.measure(pixels)
            measures["found"] = seen.found
            for name in ("area", "diameter", "asymmetry", "compactness", "touch", "contrast"):
                measures[name] = round(getattr(seen, name), _DIGITS)
            measures["shares"] = {word: round(v, _DIGITS) for word, v in seen.shares.items()}
            measures["size"] = seen.size
            measures["asymmetry_word"] = seen.asymmetry_word
            measures["border_word"] = seen.border_word
            measures["color_words"] = list(seen.colors)
        if self._index is not None:
            ((near,),) = nearest(self._index, [image], 1, self._first)
            similarity = max(0.0, round(near.similarity, _DIGITS))
            # A flat picture is like none. Of the name not its folder: a data set goes places where
            # nobody need know how the machine is laid out that made the index.
            measures["nearest"] = PurePath(near.name).name if similarity else None
            measures["similarity"] = similarity
        return measures


def reasons(needed: Thresholds, asked: Lesion, measures: dict[str, Any]) -> tuple[str, ...]:
    """Why a picture with these measures is rejected. Rules whose measure is not there pass.

    Where no lesion is found, size and colours are not judged: there is nothing they could be of.
    """
    found = [
        *_disagreement(needed, asked, measures),
        *_unlike(needed, asked, measures),
    ]
    similarity = measures.get("similarity")
    if needed.nearest is not None and similarity is not None and similarity >= needed.nearest:
        found.append(
            f"it is near {measures['nearest']}, which was seen in training (similarity "
            f"{similarity:.4f}, needed is less than {needed.nearest:g})"
        )
    return tuple(found)


def _disagreement(needed: Thresholds, asked: Lesion, measures: dict[str, Any]) -> list[str]:
    if needed.agreement == OFF or "probability" not in measures:
        return []
    malignant = measures["probability"]
    if needed.agreement == DECISION:
        said = measures["decision"]
        if said in (asked.label, "abstain"):
            return []
        return [f"the classifier says {said} ({malignant:.4f} malignant), asked was {asked.label}"]
    probability = malignant if asked.label == "malignant" else round(1 - malignant, _DIGITS)
    if probability >= float(needed.agreement):
        return []
    return [
        f"the classifier gives {asked.label} a probability of {probability:.4f}, needed is "
        f"{needed.agreement:g}"
    ]


def _unlike(needed: Thresholds, asked: Lesion, measures: dict[str, Any]) -> list[str]:
    rules = needed.attributes or ()
    if "found" not in measures:
        return []
    if not measures["found"]:
        return ["no lesion is seen"] if "lesion" in rules else []
    found = []
    if "size" in rules and asked.size is not None:
        off = abs(STEPS.index(measures["size"]) - STEPS.index(asked.size))
        if off > needed.size_steps:
            found.append(
                f"the size is {measures['size']}, asked was {asked.size}: {off} steps off, "
                f"needed is {needed.size_steps} at most"
            )
    if "colors" in rules:
        for word in asked.colors:
            share = measures["shares"][word]
            # A lesion of the skin's colour is told from skin by other things than its colour.
            if word != "skin-coloured" and share < needed.color_share:
                found.append(
                    f"{word} has a share of {share:.4f} of the lesion, needed is "
                    f"{needed.color_share:g}"
                )
    return found


def _attributes() -> ModuleType:
    """`dermaflux.attributes`, which needs scikit-image; answering requests does not.

    Raises:
        DatasetError: it is not installed.
    """
    try:
        from dermaflux import attributes
    except ImportError as error:
        raise DatasetError(
            f"the gate measures lesions with scikit-image, which is not there ({error}); run "
            f"pip install '.[batch]', or write `attributes: {OFF}` into the file of --gate"
        ) from error
    return attributes
