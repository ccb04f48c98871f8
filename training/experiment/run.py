"""Make the runs that are not there yet, in one process or several.

    >>> made = run(Config.read(file), Path("runs/experiment"), Only({}), leave_out=True)
    >>> made.done, made.failed
    (40, {})

All that can be refused is refused before the first run: pictures that tests share with what was
learnt, too few synthetic ones, runs that are there and were made with other settings.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dermaflux import files
from dermaflux.errors import DatasetError, DermaFluxError
from training.data import Sample
from training.experiment import trial
from training.experiment.config import UPPER, Config, changed
from training.experiment.guard import Guarded, guard
from training.experiment.journal import Journal, Line, lines
from training.experiment.key import Key, Only, planned
from training.experiment.sets import Sets, chosen, digest
from training.recipe import defaults

log = logging.getLogger(__name__)

ABOUT: Final = "experiment.json"
"""Config, left out pictures and what generators saw, for the report."""


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


@dataclass(frozen=True)
class Made:
    """How many runs are there of those wanted, and why some are not."""

    done: int
    made: int
    failed: Mapping[str, str]


def plan(config: Config, sets: Sets, folder: Path, only: Only) -> Plan:
    """What is to be run.

    Raises:
        DatasetError: there are too few pictures for a run, two arms are one, or a run that is there
            was made with other settings.
    """
    there = lines(folder)
    bounds = uppers(config, sets)
    wanted = [key for key in planned(config, bounds) if only.takes(key)]
    known = _Digests(sets)
    settings = {key: _settings(key, config, sets, known) for key in wanted}
    for key in wanted:
        if key in there:
            _same(key, there[key]["settings"], settings[key], folder)
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


def run(
    config: Config, folder: Path, only: Only, *, leave_out: bool = False, processes: int = 1
) -> Made:
    """Make what is missing and write `experiment.json`.

    Raises:
        DatasetError: what `plan` and `guard` refuse, or another process writes there.
    """
    sets = Sets.read(config)
    with Journal(folder) as journal:
        asked = plan(config, sets, folder, only)
        held = guard(sets, config, leave_out)
        about(config, sets, held, folder)
        kept = held.kept(sets)
        failed: dict[str, str] = {}
        work = _here if processes == 1 else _spawned
        made = 0
        with tqdm(total=len(asked.missing), unit="run", desc="experiment") as bar:
            for key, line in work(asked.missing, config, sets, kept, folder, processes):
                if isinstance(line, str):
                    log.error("%s failed: %s", key.file, line)
                    failed[key.file] = line
                else:
                    document = {"key": key.document(), "settings": asked.settings[key]}
                    journal.append({**document, **line, "saw": held.saw.get(key.generator)})
                    made += 1
                bar.update()
        done = len(asked.wanted) - len(asked.missing) + made
    return Made(done, made, failed)


def about(config: Config, sets: Sets, held: Guarded, folder: Path) -> None:
    """Write what the report needs besides the runs."""
    document = {
        "config": config.document(),
        "tests": {name: len(samples) for name, samples in sets.tests.items()},
        "left_out": {name: [asdict(one) for one in left] for name, left in held.left_out.items()},
        "generators": held.saw,
        "uppers": {name: len(samples) for name, samples in sets.uppers.items()},
        "val_copies": held.val_copies,
        "same_as_real": same_as_real(config, sets),
        "subsets": {str(size): len(sets.subset(size)) for size in config.sizes},
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / ABOUT, (json.dumps(document, indent=1) + "\n").encode())


Result = tuple[Key, dict[str, Any] | str]
"""A run and its line, or why there is none."""
Kept = Mapping[str, Sequence[Sample]]


def _here(
    keys: Sequence[Key], config: Config, sets: Sets, kept: Kept, folder: Path, processes: int
) -> Iterator[Result]:
    from training.pictures import Pictures

    album = trial.Album(Pictures())
    for key in keys:
        yield key, _tried(key, config, sets, kept, album, folder)


def _spawned(
    keys: Sequence[Key], config: Config, sets: Sets, kept: Kept, folder: Path, processes: int
) -> Iterator[Result]:
    """Runs in processes of their own: what a run gives does not depend on which it falls to."""
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _begin, (config, sets, kept, folder)
    )
    try:
        waiting = {pool.submit(_work, key): key for key in keys}
        for one in as_completed(waiting):
            yield waiting[one], one.result()
    except BrokenProcessPool as error:
        raise DatasetError(
            "a worker was killed, perhaps for want of memory; what was done is kept: start the "
            "same command again, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_GIVEN: list[Any] = []  # what a worker was begun with, and its pictures


def _begin(config: Config, sets: Sets, kept: Kept, folder: Path) -> None:
    import torch

    from training.pictures import Pictures

    torch.set_num_threads(1)
    _GIVEN[:] = [config, sets, kept, trial.Album(Pictures(1)), folder]


def _work(key: Key) -> dict[str, Any] | str:
    config, sets, kept, album, folder = _GIVEN
    return _tried(key, config, sets, kept, album, folder)


def _tried(
    key: Key, config: Config, sets: Sets, kept: Kept, album: trial.Album, folder: Path
) -> dict[str, Any] | str:
    """A run's line, or why there is none: one that fails does not end the others."""
    try:
        return trial.run(key, config, sets, kept, album, folder)
    except DermaFluxError as error:
        return str(error)


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


def _settings(key: Key, config: Config, sets: Sets, known: _Digests) -> dict[str, Any]:
    """All that a run's result follows from."""
    model = config.recipes()[key.model]
    settings = {
        "recipe": changed(model.recipe, key.arm, key.seed).fixed(),
        "pretrained": model.pretrained,
        "learnt": known(chosen(sets, config, key)),
        "val": known(sets.val),
        "tests": {name: known(samples) for name, samples in sets.tests.items()},
    }
    # As they are read again: tuples are lists there.
    return dict(json.loads(json.dumps(settings)))


def _same(key: Key, before: Line, now: Line, folder: Path) -> None:
    """Refuse to count a run that was made otherwise."""
    first, second = (_flat(one) for one in (before, now))
    usual = {f"recipe.{name}": value for name, value in defaults().items()}
    missing = object()
    for name in dict.fromkeys([*first, *second]):
        old, new = (one.get(name, usual.get(name, missing)) for one in (first, second))
        if old != new:
            said = ["nothing" if value is missing else repr(value)[:60] for value in (old, new)]
            raise DatasetError(
                f"{folder} has the run {key.file} with another {name}: {said[0]}, and now it is "
                f"{said[1]}; give another --out, or delete the run's line in runs.jsonl"
            )


def _flat(settings: Line) -> dict[str, Any]:
    """`{"recipe": {"steps": 8}}` -> `{"recipe.steps": 8}`, two levels deep."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            found[name] = value
    return found
