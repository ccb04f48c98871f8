"""Which runs an experiment has, and in which order.

    >>> planned(config, {"mini": 2117})[0]
    Key(arm='real', generator='', model='model', size=250, ratio=0.0, seed=0)
    >>> [key for key in planned(config, {}) if Only.parsed("arm=added,size=500").takes(key)]

All arms of the smallest size and the first seed come first, so that what is there after a short
while can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dermaflux.errors import DatasetError
from training.experiment.config import ADDED, ARMS, CLASSIC, ONLY, REAL, UPPER, WEIGHTS, Config


@dataclass(frozen=True)
class Key:
    """A run. `generator` is empty and `ratio` 0 where it learns real pictures alone.

    `size` is the number of real pictures (of arm synthetic-only: those it stands against).
    """

    arm: str
    generator: str
    model: str
    size: int
    ratio: float
    seed: int

    @property
    def file(self) -> str:
        """A file name that no other run has."""
        parts = (self.arm, self.generator, self.model, self.size, f"{self.ratio:g}", self.seed)
        return "_".join(str(part) for part in parts if part != "")

    @property
    def cell(self) -> Key:
        """The run without its seed: what runs of other seeds are averaged with."""
        return Key(self.arm, self.generator, self.model, self.size, self.ratio, 0)

    def document(self) -> dict[str, Any]:
        """As a line of the journal has it."""
        return asdict(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Key:
        """What `document` gave. Raises what a mapping of another kind raises."""
        return cls(
            str(row["arm"]), str(row["generator"]), str(row["model"]),
            int(row["size"]), float(row["ratio"]), int(row["seed"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Only:
    """Which runs are wanted: for some of a key's fields, the values that it may have."""

    wanted: Mapping[str, tuple[str, ...]]

    @classmethod
    def parsed(cls, text: str) -> Only:
        """Of `"arm=real,arm=added,size=500"`: a field that is named twice may have either value.

        Raises:
            DatasetError: there is no such field, or no value.
        """
        known = [one.name for one in fields(Key)]
        wanted: dict[str, tuple[str, ...]] = {}
        for part in filter(None, (one.strip() for one in text.split(","))):
            name, equals, value = (one.strip() for one in part.partition("="))
            if name not in known or not equals:
                raise DatasetError(
                    f"--only {part!r} is not a field and its value; fields: {', '.join(known)}; "
                    "such as --only arm=added,size=500"
                )
            wanted[name] = (*wanted.get(name, ()), value)
        return cls(wanted)

    def takes(self, key: Key) -> bool:
        """Whether a run is wanted."""
        return all(self._one(getattr(key, name), texts) for name, texts in self.wanted.items())

    def _one(self, value: object, texts: tuple[str, ...]) -> bool:
        if isinstance(value, str):
            return value in texts
        try:
            return value in [float(text) for text in texts]
        except ValueError:
            raise DatasetError(f"--only {', '.join(texts)}: not a number") from None


def planned(config: Config, uppers: Mapping[str, int]) -> list[Key]:
    """Every run of an experiment, in order.

    `uppers` has the number of real pictures that each generator saw, without those of whom a real
    subset holds the same ones: that is the bound then.
    """
    ratios = sorted(ratio for ratio in config.ratios if ratio > 0)
    keys: list[Key] = []
    for model in config.recipes():
        for size in config.sizes:
            for arm in (REAL, CLASSIC, WEIGHTS):
                keys.append(Key(arm, "", model, size, 0.0, 0))
            for arm in (ADDED, ONLY):
                keys += [
                    Key(arm, generator, model, size, ratio, 0)
                    for generator in config.of_size(size)
                    for ratio in ratios
                ]
        keys += [Key(UPPER, name, model, size, 0.0, 0) for name, size in uppers.items()]
    models, generators = list(config.recipes()), ["", *config.generators]

    def place(key: Key) -> tuple[int, ...]:
        # Real alone is what all others are compared with, so it is the first of each size.
        return (
            models.index(key.model), key.size, ARMS.index(key.arm),
            generators.index(key.generator),
        )  # fmt: skip

    listed = sorted((key for key in keys if key.arm in config.arms), key=place)
    return [
        Key(key.arm, key.generator, key.model, key.size, key.ratio, seed)
        for seed in range(config.seeds)
        for key in listed
    ]
