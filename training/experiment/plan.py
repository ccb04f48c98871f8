"""Which runs are wanted, which are there already, and all that a run's result follows from.

    >>> asked = plan(config, Sets.read(config), Path("runs/experiment"), Only({}))
    >>> len(asked.wanted), len(asked.missing)
    (60, 20)

A run's settings (recipe, digests of what it learns, of validation and tests) stand beside its
figures: a run that was made with others is never counted for one that is asked for, nor are runs
added to a folder whose other runs could not be compared with them (`training.experiment.alike`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from training.data import Sample
from training.experiment import alike
from training.experiment.config import REAL, UPPER, Config, Model, changed
from training.experiment.journal import lines
from training.experiment.key import Key, Only, planned
from training.experiment.sets import Sets, chosen, digest


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment: wanted, and of these those to make; `settings` of each."""

    wanted: list[Key]
    missing: list[Key]
    settings: Mapping[Key, dict[str, Any]]
    seconds: Mapping[Key, float] = field(default_factory=dict)

    @property
    def unknown(self) -> int:
        """How many are to be made of which nothing alike was made yet."""
        return sum(key not in self.seconds for key in self.missing)

    @property
    def hours(self) -> float:
        """The time that the others take in one process."""
        return sum(self.seconds.get(key, 0.0) for key in self.missing) / 3600


def plan(config: Config, sets: Sets, folder: Path, only: Only) -> Plan:
    """What is to be run.

    Raises:
        DatasetError: there are too few pictures for a run, two arms are one, or a run that is there
            was made with other settings, be it wanted or not.
    """
    there = lines(folder)
    bounds = uppers(config, sets)
    wanted = [key for key in planned(config, bounds) if only.takes(key)]
    known = _Digests(sets)
    settings = {key: _settings(key, config, sets, known) for key in wanted}
    alike.check(there, folder, _common(config, sets, known))
    for key in wanted:
        if key in there:
            alike.same(key, there[key]["settings"], settings[key], folder)
    missing = [key for key in wanted if key not in there]
    took: dict[str, list[float]] = {}
    for key, line in there.items():
        took.setdefault(key.model, []).append(float(line["seconds"]))
    seconds = {
        key: sum(took[key.model]) / len(took[key.model]) for key in missing if key.model in took
    }
    return Plan(wanted, missing, settings, seconds)


def uppers(config: Config, sets: Sets) -> dict[str, int]:
    """The size of each generator's upper bound, without those that are a real subset already."""
    if UPPER not in config.arms:
        return {}
    same = same_as_real(config, sets)
    return {name: len(one) for name, one in sets.uppers.items() if one and name not in same}


def same_as_real(config: Config, sets: Sets) -> dict[str, int]:
    """The generators that saw just the real subset of a size, and which: the bound is there."""
    subsets = {frozenset(digest(s.file) for s in sets.subset(size)): size for size in config.sizes}
    seen = {name: frozenset(digest(s.file) for s in one) for name, one in sets.uppers.items()}
    return {name: subsets[files] for name, files in seen.items() if files in subsets}


class _Digests:
    """Digests of samples with their labels, each picture read once."""

    def __init__(self, sets: Sets) -> None:
        self._names = sets.names
        self._files: dict[Path, str] = {}

    def __call__(self, samples: Sequence[Sample]) -> str:
        found = sha256()
        for one in samples:
            if one.file not in self._files:
                self._files[one.file] = digest(one.file)
            found.update(
                f"{self._names[one.file]} {one.lesion.label} {self._files[one.file]}\n".encode()
            )
        return found.hexdigest()[:16]


def _common(config: Config, sets: Sets, known: _Digests) -> dict[Key, dict[str, Any]]:
    """What every run of a model has, whatever it learns."""
    return {
        Key(REAL, "", name, 0, 0.0, 0): _as_read(
            {
                "recipe": model.recipe.fixed(),
                "pretrained": _weights(model),
                "val": known(sets.val),
                "tests": {test: known(samples) for test, samples in sets.tests.items()},
            }
        )
        for name, model in config.recipes().items()
    }


def _weights(model: Model) -> str | None:
    """The weights that runs begin with: their path, and a part of the hash of what lies there."""
    if model.pretrained is None:
        return None
    path = Path(model.pretrained)
    inside = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    files = inside if path.is_dir() else [path]
    return " ".join([model.pretrained, *map(digest, files)])


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read again: tuples are lists there."""
    return dict(json.loads(json.dumps(settings)))


def _settings(key: Key, config: Config, sets: Sets, known: _Digests) -> dict[str, Any]:
    """All that a run's result follows from."""
    model = config.recipes()[key.model]
    settings = {
        "recipe": changed(model.recipe, key.arm, key.seed).fixed(),
        "pretrained": _weights(model),
        "learnt": known(chosen(sets, config, key)),
        "val": known(sets.val),
        "tests": {name: known(samples) for name, samples in sets.tests.items()},
    }
    return _as_read(settings)
