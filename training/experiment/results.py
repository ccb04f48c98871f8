"""What the runs gave, computed anew from their raw scores.

    >>> found = Results.read(Path("runs/experiment"))
    >>> found.values(cell, View("test"), "auc")            # one a seed
    array([0.79, 0.81])
    >>> found.difference(cell, found.real(cell), View("test"), "auc")
    {'value': 0.0123, 'interval': [-0.004, 0.0301], 'above_zero': 0.93, 'seeds': 5}

Runs are compared on the pictures that all of them were tested on. Differences are paired: the same
test pictures, the same seeds; lesions and seeds are drawn (`training.bootstrap`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.errors import DatasetError
from training import bootstrap, metrics
from training.experiment import alike, raw
from training.experiment.config import ADDED, ARMS, REAL, UPPER
from training.experiment.journal import Line, lines
from training.experiment.key import Key
from training.experiment.raw import VAL, Scores
from training.experiment.run import ABOUT
from training.figures import Floats

HISTOLOGY: Final = "histo"
MEASURES: Final = (
    "auc", "pauc", "sensitivity_at_95_specificity", "accuracy", "balanced_accuracy", "sensitivity",
    "specificity", "brier", "calibration_error",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """Which test, whether its histology-confirmed pictures alone, and which score is looked at.

    `control` is "border" or "masked" for what the model says of pictures without their lesion.
    """

    test: str
    confirmed: bool = False
    control: str = ""


@dataclass
class Results:
    """The runs of a folder. `pictures` are by test those that every run was tested on."""

    folder: Path
    about: Mapping[str, Any]
    lines: Mapping[Key, Line]
    scores: Mapping[Key, Scores]
    draws: int = bootstrap.DRAWS
    _differences: dict[Any, dict[str, Any]] = field(default_factory=dict)
    _figures: dict[tuple[Key, View], dict[str, float]] = field(default_factory=dict)
    _views: dict[tuple[Key, View], Scores] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, draws: int = bootstrap.DRAWS) -> Results:
        """The finished runs with their scores.

        Raises:
            DatasetError: there is none, some cannot be compared with others, or scores are missing
                or not those that the run wrote.
        """
        found = lines(folder)
        if not found:
            raise DatasetError(
                f"{folder} has no finished run; make some with: "
                f"python -m training.experiment CONFIG --out {folder}"
            )
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{folder / ABOUT} cannot be read ({error}); the command that made the runs "
                "writes it again"
            ) from error
        alike.check(found, folder)
        # The runs know best: the file is of the last call alone.
        about["generators"] = {**about["generators"], **alike.saw(found, folder)}
        scores = {key: _scores(folder, line) for key, line in found.items()}
        return cls(folder, about, found, scores, draws)

    @cached_property
    def pictures(self) -> dict[str, list[str]]:
        """Names by test, in the order of the first run."""
        out = {name: {one["file"] for one in left} for name, left in self.about["left_out"].items()}
        found: dict[str, list[str]] = {}
        for name in self.about["tests"]:
            tested = [s.picture[s.part == name].tolist() for s in self.scores.values()]
            common = set(tested[0]).intersection(*tested[1:]) - out.get(name, set())
            found[name] = [picture for picture in tested[0] if picture in common]
        return found

    @cached_property
    def cells(self) -> dict[Key, list[int]]:
        """The seeds of each cell, cells in the order in which they are planned."""
        models = list(dict.fromkeys(key.model for key in self.lines))
        generators = list(dict.fromkeys(key.generator for key in self.lines))

        def place(key: Key) -> tuple[Any, ...]:
            return (
                models.index(key.model), key.size, ARMS.index(key.arm),
                generators.index(key.generator), key.ratio,
            )  # fmt: skip

        seeds: dict[Key, list[int]] = {}
        for key in sorted(self.lines, key=lambda one: (*place(one), one.seed)):
            seeds.setdefault(key.cell, []).append(key.seed)
        return seeds

    def real(self, cell: Key) -> Key:
        """The cell of real pictures alone that `cell` is compared with."""
        return Key(REAL, "", cell.model, cell.size, 0.0, 0)

    def views(self) -> list[View]:
        """Every test, and its confirmed pictures where it has those and others."""
        found: list[View] = []
        for name, pictures in self.pictures.items():
            if not pictures:
                continue
            found.append(View(name))
            known = self._of(next(iter(self.scores)), View(name)).confirmed
            if 0 < (known == HISTOLOGY).sum() < len(known):
                found.append(View(name, confirmed=True))
        return found

    def counts(self, view: View) -> tuple[int, int]:
        """Pictures and malignant ones of a view."""
        scores = self._of(next(iter(self.scores)), view)
        return len(scores.label), int(scores.label.sum())

    def measured(self, cell: Key, view: View) -> dict[str, Floats]:
        """Each figure of a cell, one value a seed [S]."""
        for key in self._keys(cell):
            if (key, view) not in self._figures:
                found = raw.measured(self._of(key, view), self._calibration(key))
                self._figures[key, view] = found
        runs = [self._figures[key, view] for key in self._keys(cell)]
        return {name: np.array([one[name] for one in runs]) for name in MEASURES}

    def values(self, cell: Key, view: View, measure: str) -> Floats:
        """One figure of a cell, one value a seed [S]; of a control, its AUC."""
        if not view.control:
            return self.measured(cell, view)[measure]
        found = []
        for key in self._keys(cell):
            scores = self._of(key, view)
            control = getattr(scores, view.control)
            known = np.isfinite(control)
            found.append(metrics.auc(control[known], scores.label[known])[0])
        return np.array(found)

    def difference(
        self, first: Key, second: Key, view: View, measure: str
    ) -> dict[str, Any] | None:
        """AUC or accuracy of `first` less that of `second`, over the seeds that both have.

        None where they have none in common.
        """
        asked = (first, second, view, measure)
        if asked not in self._differences:
            seeds = [
                seed for seed in self.cells.get(first, ()) if seed in self.cells.get(second, ())
            ]
            if not seeds:
                return None
            one = self._of(self._keyed(first, seeds[0]), view)
            left, right = (
                np.stack([self._side(self._keyed(cell, seed), view, measure) for seed in seeds])
                for cell in (first, second)
            )
            metric = metrics.auc if measure == "auc" else metrics.accuracy
            found = bootstrap.difference(metric, left, right, one.label, one.group, self.draws)
            self._differences[asked] = found | {"seeds": len(seeds)}
        return self._differences[asked]

    def hours(self, keys: Sequence[Key]) -> dict[str, float]:
        """What runs cost: wall-clock, CPU and GPU hours."""
        return {
            name: sum(float(self.lines[key][f"{name}seconds"]) for key in keys) / 3600
            for name in ("", "cpu_", "gpu_")
        }

    def added(self) -> list[Key]:
        """The cells in which synthetic pictures stand beside real ones."""
        return [cell for cell in self.cells if cell.arm == ADDED]

    def bounds(self, model: str) -> dict[Key, Key]:
        """The upper bound of each generator, and the cell of its figures.

        That is the arm real of a size where the generator saw just that subset's pictures.
        """
        found = {c: c for c in self.cells if c.model == model and c.arm == UPPER}
        known = {bound.generator for bound in found}
        for name, size in self.about["same_as_real"].items():
            real = Key(REAL, "", model, int(size), 0.0, 0)
            if real in self.cells and name not in known:
                found[Key(UPPER, name, model, int(size), 0.0, 0)] = real
        return found

    def _keys(self, cell: Key) -> list[Key]:
        return [self._keyed(cell, seed) for seed in self.cells[cell]]

    def _keyed(self, cell: Key, seed: int) -> Key:
        return Key(cell.arm, cell.generator, cell.model, cell.size, cell.ratio, seed)

    def _side(self, key: Key, view: View, measure: str) -> Any:
        logits = self._of(key, view).logits
        difference = logits[:, 1] - logits[:, 0]
        return difference if measure == "auc" else difference > 0

    def _calibration(self, key: Key) -> dict[str, float]:
        scores = self.scores[key]
        return raw.calibrated(scores.where(scores.part == VAL))

    def _of(self, key: Key, view: View) -> Scores:
        """A run's scores of a view's pictures, in the same order for every run."""
        view = View(view.test, view.confirmed)
        if (key, view) not in self._views:
            scores = self.scores[key]
            scores = scores.where(scores.part == view.test)
            rows = {name: row for row, name in enumerate(scores.picture)}
            order = [rows[name] for name in self.pictures[view.test]]
            found = scores.where(np.array(order, np.int64))
            if view.confirmed:
                found = found.where(found.confirmed == HISTOLOGY)
            self._views[key, view] = found
        return self._views[key, view]


def _scores(folder: Path, line: Line) -> Scores:
    file = folder / str(line["scores"])
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{file} cannot be read ({error.strerror or error}); delete its line in runs.jsonl, "
            "and the run is made again"
        ) from error
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        raise DatasetError(
            f"{file} is not what its run wrote; delete its line in runs.jsonl, and the run is "
            "made again"
        )
    return Scores.read(file)
