"""The pictures of an experiment: what is learnt, what is tested, and what generators saw.

    >>> sets = Sets.read(config)
    >>> len(sets.train), {name: len(test) for name, test in sets.tests.items()}
    (2117, {'test': 585, 'ham10000': 1332})
    >>> chosen(sets, config, Key("added", "mini", "model", 500, 1.75, 0))   # 500 + 875 samples

The real subset of a size is the same for all arms and seeds, and within every larger one; which
synthetic pictures are added varies with the seed, and those of a ratio are within a larger one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dermaflux.errors import DatasetError
from dermaflux.prompt import LABELS
from training import data, mixing
from training.data import Sample
from training.experiment.config import ADDED, ONLY, UPPER, Config
from training.experiment.key import Key
from training.grouping import isic_number
from training.leaks import seen as read_seen

TEST: Final = "test"
"""The name of the real dataset's test; external ones have their folder's."""
SUBSET_SEED: Final = 0


@dataclass(frozen=True)
class Sets:
    """Samples by use. `pools` are generated pictures, `uppers` the real training pictures that a
    generator saw, both by generator; `unknown` counts those seen whose label nobody here knows.
    `names` gives each picture's dataset and its path within.
    """

    train: list[Sample]
    val: list[Sample]
    tests: dict[str, list[Sample]]
    pools: dict[str, list[Sample]]
    uppers: dict[str, list[Sample]]
    unknown: dict[str, int]
    names: dict[Path, str]

    @classmethod
    def read(cls, config: Config) -> Sets:
        """Read all metadata; no picture is opened, but those that `uppers` may have twice.

        Raises:
            DatasetError: a folder is no dataset, a split is empty or lacks a class, a generated
                picture is given as real, or there are too few for a size.
        """
        names: dict[Path, str] = {}
        real = _named(Path(config.real), names)
        splits = {name: [s for s in real if s.split == name] for name in ("train", "val", "test")}
        for name, samples in splits.items():
            _both(samples, f"split {name} of {config.real}")
        if max(config.sizes) > len(splits["train"]):
            raise DatasetError(
                f"sizes has {max(config.sizes)}, and {config.real} has {len(splits['train'])} "
                "training pictures"
            )
        tests = {TEST: splits["test"]}
        learnable = list(splits["train"])
        for path in map(Path, config.external):
            if path.resolve() == Path(config.real).resolve():
                raise DatasetError(
                    f"external {path} is the real dataset, whose test is one already"
                )
            if path.resolve().name in (*tests, Path(config.real).resolve().name):
                raise DatasetError(
                    f"external {path}: another dataset or test is called {path.resolve().name} "
                    "already; rename it"
                )
            samples = _named(path, names)
            mixing.only_training([], samples)
            tests[path.resolve().name] = [s for s in samples if s.split == "test"]
            _both(tests[path.resolve().name], f"split test of {path}")
            learnable += [s for s in samples if s.split == "train"]
        pools, uppers, unknown = {}, {}, {}
        for name, one in config.generators.items():
            try:
                pools[name] = mixing.only_training(_named(Path(one.data), names), real)
                uppers[name], unknown[name] = _upper(one.seen, learnable, names)
            except DatasetError as error:
                raise DatasetError(f"generator {name}: {error}") from error
        return cls(splits["train"], splits["val"], tests, pools, uppers, unknown, names)

    def subset(self, size: int) -> list[Sample]:
        """The real training pictures of a size."""
        return mixing.limited(self.train, size, SUBSET_SEED)


def chosen(sets: Sets, config: Config, key: Key) -> list[Sample]:
    """What a run learns.

    Raises:
        DatasetError: the generator has made too few pictures; the message says how many it takes.
    """
    if key.arm == UPPER:
        return sets.uppers[key.generator]
    real = sets.subset(key.size)
    if key.arm not in (ADDED, ONLY):
        return real
    try:
        made = mixing.synthetic(
            sets.pools[key.generator], real, key.ratio, key.seed, config.ratio_by
        )
    except DatasetError as error:
        raise DatasetError(f"generator {key.generator}: {error}") from error
    return made if key.arm == ONLY else [*real, *made]


def digest(file: Path) -> str:
    """Sixteen hex digits of a file's content.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error


def _named(folder: Path, names: dict[Path, str]) -> list[Sample]:
    samples = data.read(folder)
    within = folder.resolve().name
    names |= {s.file: f"{within}/{s.file.relative_to(folder).as_posix()}" for s in samples}
    return samples


def _both(samples: Sequence[Sample], where: str) -> None:
    counts = {label: sum(s.lesion.label == label for s in samples) for label in LABELS}
    for label, count in counts.items():
        if not count:
            raise DatasetError(f"{where} has no {label} picture among its {len(samples)}")


def _upper(
    seen: Sequence[Path], learnable: Sequence[Sample], names: dict[Path, str]
) -> tuple[list[Sample], int]:
    """The labelled training pictures that were seen, each once, and how many seen are none.

    A dataset folder tells its own; an index has names alone, which the experiment's other datasets
    may know (by path, or by the archive's number).
    """
    found: list[Sample] = []
    unknown = 0
    for path in seen:
        if path.is_file():
            listed = read_seen(path).names
            files = {str(s.file): s for s in learnable}
            files |= {str(s.file.resolve()): s for s in learnable}
            numbers = {isic_number(str(s.file)): s for s in learnable}
            numbers.pop(isic_number(""), None)
            known = [files.get(name) or numbers.get(isic_number(name)) for name in listed]
            found += [s for s in known if s is not None]
            unknown += sum(s is None for s in known)
        else:
            mine = [s for s in _named(path, names) if s.split == "train"]
            if not mine:
                raise DatasetError(f"saw: {path} has no sample in split train")
            found += mine
    once: dict[str, Sample] = {}
    for sample in found:
        once.setdefault(digest(sample.file), sample)
    return [s for s in once.values() if s.confirmed != mixing.SYNTHETIC], unknown
