"""What a classifier said of each picture, kept beside its weights to redo every figure from.

`scores.csv` has a line a picture: what it is (`file, group, source, confirmed, split, label,
diagnosis, age, sex, site, skin_type`), what the model said (`logit_benign, logit_malignant,
probability, decision`) and the two controls' scores (`border_only, lesion_masked`: malignant less
benign logit, empty where there is none). Numbers are written so that reading gives the same ones.

    >>> raw = RawScores.of(samples, logits, calibration)
    >>> raw.write(folder / "scores.csv")
    >>> RawScores.read(folder / "scores.csv").where(raw.source == "ISIC 2017").auc
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux import files
from dermaflux.errors import DatasetError
from dermaflux.prompt import LABELS
from training import data
from training.figures import Floats
from training.roc import Labels

Texts = NDArray[np.str_]

DECISIONS: Final = (*LABELS, "abstain")
_NUMBERS: Final = (
    "age", "logit_benign", "logit_malignant", "probability", "border_only", "lesion_masked",
)  # fmt: skip
_OPTIONAL: Final = ("age", "border_only", "lesion_masked")


@dataclass(frozen=True)
class RawScores:
    """Columns [N] of pictures; numbers that are not known are NaN, texts are empty.

    `file` is relative to its dataset's folder. `probability` is the calibrated one of malignant,
    0 to 1; `decision` one of `DECISIONS`.
    """

    file: Texts
    group: Texts
    source: Texts
    confirmed: Texts
    split: Texts
    label: Labels
    diagnosis: Texts
    age: Floats
    sex: Texts
    site: Texts
    skin_type: Texts
    logit_benign: Floats
    logit_malignant: Floats
    probability: Floats
    decision: Texts
    border_only: Floats
    lesion_masked: Floats

    def __len__(self) -> int:
        return len(self.file)

    @property
    def logits(self) -> Floats:
        """[N, 2]."""
        return np.stack([self.logit_benign, self.logit_malignant], axis=1)

    def where(self, rows: NDArray[Any]) -> RawScores:
        """The rows that are true [N], or of these numbers."""
        return RawScores(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})

    @classmethod
    def of(
        cls, samples: Sequence[data.Sample], logits: Floats, calibration: Mapping[str, Any],
        border_only: Floats | None = None, lesion_masked: Floats | None = None,
    ) -> RawScores:  # fmt: skip
        """The rows of `samples` with their `logits` [N, 2]; what is unknown stays so."""
        p = probabilities(logits, calibration["temperature"])
        unknown = np.full(len(samples), np.nan)

        def texts(name: str) -> Texts:
            return np.array([getattr(one, name) or "" for one in samples], np.str_)

        return cls(
            file=np.array([s.name or s.file.name for s in samples], np.str_),
            group=texts("group"),
            source=texts("source"),
            confirmed=texts("confirmed"),
            split=texts("split"),
            label=np.array([LABELS.index(str(s.lesion.label)) for s in samples], np.int64),
            diagnosis=np.array([s.lesion.diagnosis or "" for s in samples], np.str_),
            age=np.array([math.nan if s.age is None else s.age for s in samples], float),
            sex=texts("sex"),
            site=texts("site"),
            skin_type=texts("skin_type"),
            logit_benign=logits[:, 0],
            logit_malignant=logits[:, 1],
            probability=p,
            decision=decisions(p, calibration),
            border_only=unknown if border_only is None else border_only,
            lesion_masked=unknown if lesion_masked is None else lesion_masked,
        )

    @classmethod
    def joined(cls, parts: Sequence[RawScores]) -> RawScores:
        """The rows of all parts, in order."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})

    def write(self, file: Path) -> None:
        """Write the table, whole or not at all."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        names = [one.name for one in fields(self)]
        lines.writerow(names)
        columns = [_written(name, getattr(self, name)) for name in names]
        lines.writerows(zip(*columns, strict=True))
        files.write(file, text.getvalue().encode())

    @classmethod
    def read(cls, file: Path) -> RawScores:
        """What `write` wrote.

        Raises:
            DatasetError: it is no such table; the message names the line.
        """
        names = [one.name for one in fields(cls)]
        try:
            with file.open(encoding="utf-8", newline="") as stream:
                lines = csv.reader(stream)
                head = next(lines, [])
                if head != names:
                    missing = [name for name in names if name not in head]
                    raise DatasetError(
                        f"{file} has not the columns of raw scores"
                        + (f" (there is no {', '.join(missing)})" if missing else " in their order")
                        + "; give the scores.csv that python -m training.vit wrote"
                    )
                rows = [_row(file, number, names, line) for number, line in enumerate(lines, 2)]
        except OSError as error:
            raise DatasetError(
                f"{file} cannot be read ({error.strerror or error}); give the scores.csv that "
                "python -m training.vit wrote beside the weights"
            ) from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DatasetError(f"{file} is no table of raw scores: {error}") from error
        columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        for name, values in columns.items():
            kind = np.float64 if name in _NUMBERS else np.int64 if name == "label" else np.str_
            columns[name] = np.array(values, kind)
        return cls(**columns)


def probabilities(logits: Floats, scale: float) -> Floats:
    """Probability of malignant at temperature `scale`, [N]."""
    difference = (logits[:, 1] - logits[:, 0]) / scale
    with np.errstate(over="ignore"):  # exp(800) is infinite, and 1 over it is 0 as it should be
        return np.asarray(1 / (1 + np.exp(-difference)))


def decisions(probability: Floats, calibration: Mapping[str, Any]) -> Texts:
    """What the service decides: the label, or `abstain` within the band (low <= p < high).

    What is no number is no answer either.
    """
    low, high = calibration["abstain"]
    labels = np.where(probability >= calibration["threshold"], LABELS[1], LABELS[0])
    unsure = (low <= probability) & (probability < high) | ~np.isfinite(probability)
    return np.where(unsure, "abstain", labels)


def _written(name: str, column: NDArray[Any]) -> list[str]:
    if name == "label":
        return [LABELS[value] for value in column.tolist()]
    if name in _NUMBERS:
        empty = name in _OPTIONAL
        return ["" if empty and math.isnan(v) else repr(v) for v in column.tolist()]
    return list(column.tolist())


def _row(file: Path, number: int, names: Sequence[str], line: Sequence[str]) -> list[Any]:
    where = f"{file}, line {number}"
    if len(line) != len(names):
        raise DatasetError(f"{where}: has {len(line)} fields and needs {len(names)}")
    row: list[Any] = []
    for name, text in zip(names, line, strict=True):
        if name == "label":
            if text not in LABELS:
                raise DatasetError(f"{where}: label {text!r} is not one of {', '.join(LABELS)}")
            row.append(LABELS.index(text))
        elif name == "decision" and text not in DECISIONS:
            raise DatasetError(f"{where}: decision {text!r} is not one of {', '.join(DECISIONS)}")
        elif name in _NUMBERS:
            try:
                row.append(math.nan if name in _OPTIONAL and not text else float(text))
            except ValueError:
                raise DatasetError(f"{where}: {name} {text!r} is no number") from None
        else:
            row.append(text)
    return row
