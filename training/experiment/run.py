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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from dermaflux import files
from dermaflux.errors import DatasetError, DermaFluxError
from training.data import Sample
from training.experiment import alike, trial
from training.experiment.config import Config
from training.experiment.guard import Guarded, guard, pools_apart
from training.experiment.journal import Journal, lines
from training.experiment.key import Key, Only
from training.experiment.plan import plan, same_as_real
from training.experiment.sets import Sets

log = logging.getLogger(__name__)

ABOUT: Final = "experiment.json"
"""Config of the last call, left out pictures and what generators saw, for the report."""


@dataclass(frozen=True)
class Made:
    """How many runs are there of those wanted, and why some are not."""

    done: int
    made: int
    failed: Mapping[str, str]


def run(
    config: Config, folder: Path, only: Only, *, leave_out: bool = False, processes: int = 1,
    command: str = "",
) -> Made:  # fmt: skip
    """Make what is missing and write `experiment.json`; `command` is what asked for it.

    Raises:
        DatasetError: what `plan` and `guard` refuse, or another process writes there.
    """
    sets = Sets.read(config)
    with Journal(folder) as journal:
        sets, dropped = pools_apart(sets, leave_out)
        asked = plan(config, sets, folder, only)
        held = replace(guard(sets, config, leave_out), dropped=dropped)
        about(config, sets, held, folder, command)
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


def about(config: Config, sets: Sets, held: Guarded, folder: Path, command: str = "") -> None:
    """Write what the report needs besides the runs; what earlier calls wrote of runs stays.

    Raises:
        DatasetError: runs are there of a generator that saw something else.
    """
    there = lines(folder)
    before = _before(folder) if there else {}
    ran = alike.saw(there, folder)
    generators = {
        name: alike.joined(name, ran.get(name, {}), facts, folder)
        for name, facts in held.saw.items()
    }
    known = {**ran, **generators}
    listed: dict[str, dict[str, Any]] = {
        "dropped": {name: [asdict(one) for one in left] for name, left in held.dropped.items()},
        "uppers": {name: len(samples) for name, samples in sets.uppers.items()},
        "same_as_real": same_as_real(config, sets),
    }
    left = {name: [asdict(one) for one in out] for name, out in held.left_out.items()}
    for name, out in before.get("left_out", {}).items():
        mine = left.setdefault(name, [])
        by = {(one["file"], one["by"]) for one in mine}
        mine += [one for one in out if (one["file"], one["by"]) not in by]
    document = {
        "config": config.document(),
        "commands": list(dict.fromkeys([*before.get("commands", ()), *filter(None, [command])])),
        "tests": {name: len(samples) for name, samples in sets.tests.items()},
        "left_out": left,
        "generators": known,
        **{
            what: {
                **{name: one for name, one in before.get(what, {}).items() if name in ran}, **now,
            }
            for what, now in listed.items()
        },
        "val_copies": held.val_copies,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / ABOUT, (json.dumps(document, indent=1) + "\n").encode())


def as_recorded(sets: Sets, folder: Path) -> Sets:
    """The sets without the generated pictures that earlier runs there left out."""
    out = {
        name: {one["file"] for one in left}
        for name, left in _before(folder).get("dropped", {}).items()
    }
    pools = {
        name: [one for one in pool if sets.names[one.file] not in out.get(name, ())]
        for name, pool in sets.pools.items()
    }
    return replace(sets, pools=pools)


def _before(folder: Path) -> dict[str, Any]:
    """What an earlier call wrote; nothing where it is gone."""
    try:
        return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(
            f"{folder / ABOUT} cannot be read ({error}); it names the pictures that were left out "
            "of tests: delete it if the report may do without those of earlier calls"
        ) from error


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
