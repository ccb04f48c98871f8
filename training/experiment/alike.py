"""What the runs of a folder share, whatever they learn: else their figures say nothing together.

    >>> check(lines(folder), folder)
    >>> saw(lines(folder), folder)["mini"]["pictures"]
    2117

All runs have the same validation and tests. Those of a model have the same recipe and the same
weights at the start, but for the seed and for what an arm is there to change. Those of a generator
are of one generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dermaflux.errors import DatasetError
from training.experiment.config import CLASSIC, WEIGHTS
from training.experiment.journal import Line
from training.experiment.key import Key
from training.recipe import defaults

_MISSING: Final = object()
_CHANGES: Final = {CLASSIC: ("augment",), WEIGHTS: ("class_weights", "sampling")}
"""What arms change of a recipe (`training.experiment.config.changed`)."""


def check(there: Mapping[Key, Line], folder: Path, now: Mapping[Key, Line] | None = None) -> None:
    """Pass where all runs may stand in one report; `now` are settings that they must have too.

    Raises:
        DatasetError: two runs, or one and `now`, differ in what they should share.
    """
    firsts: dict[tuple[str, ...], tuple[Key | None, Line]] = {}
    for key, settings in (now or {}).items():
        for of, shared in _shared(key, settings):
            firsts.setdefault(of, (None, shared))
    for key, line in there.items():
        for of, shared in _shared(key, line["settings"]):
            other, first = firsts.setdefault(of, (key, shared))
            if other is None:
                same(key, shared, first, folder)
            elif found := differing(first, shared):
                name, old, new = found
                raise DatasetError(
                    f"{folder} has runs that cannot be compared: {name} is {old} in {other.file} "
                    f"and {new} in {key.file}; delete the lines of one kind in runs.jsonl, and "
                    "make those runs again"
                )


def same(key: Key, before: Line, now: Line, folder: Path) -> None:
    """Refuse to count a run that was made otherwise."""
    if found := differing(before, now):
        name, old, new = found
        raise DatasetError(
            f"{folder} has the run {key.file} with another {name}: {old}, and now it is {new}; "
            "give another --out, or delete the run's line in runs.jsonl"
        )


def differing(before: Line, now: Line, common: bool = False) -> tuple[str, str, str] | None:
    """The first setting that differs, as it was and as it is; None where all are the same.

    A field of a recipe that came later has its default in older runs. `common`: what just one of
    the two has is no difference.
    """
    first, second = (_flat(one) for one in (before, now))
    usual = {f"recipe.{name}": value for name, value in defaults().items()}
    for name in dict.fromkeys([*first, *second]):
        old, new = (one.get(name, usual.get(name, _MISSING)) for one in (first, second))
        if old == new or (common and (old is _MISSING or new is _MISSING)):
            continue
        said = ["nothing" if value is _MISSING else repr(value)[:60] for value in (old, new)]
        return name, said[0], said[1]
    return None


def saw(there: Mapping[Key, Line], folder: Path) -> dict[str, dict[str, Any]]:
    """What each generator saw, as its runs say.

    Raises:
        DatasetError: two runs of a generator say different things.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, line in there.items():
        if key.generator and line.get("saw"):
            before = found.get(key.generator, {})
            found[key.generator] = joined(key.generator, before, line["saw"], folder)
    return found


def joined(generator: str, before: Line, now: Line, folder: Path) -> dict[str, Any]:
    """Two accounts of what a generator saw, as one.

    Raises:
        DatasetError: they are not of one generator.
    """
    # The same pictures may be named by another path.
    known = before.get("digest") is not None and now.get("digest") is not None
    old, new = (
        {name: one for name, one in facts.items() if not (known and name == "saw")}
        for facts in (before, now)
    )
    if differs := differing(old, new, common=True):
        name, was, is_now = differs
        raise DatasetError(
            f"{folder} has runs of generator {generator} that saw something else: {name} was {was} "
            f"in some, and is {is_now} in others or now; give another generator another name, or "
            "another --out, or delete the lines of one kind in runs.jsonl"
        )
    inside = {**before.get("in_subset", {}), **now.get("in_subset", {})}
    return {**before, **now, "in_subset": inside}


def _shared(key: Key, settings: Line) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """With whom a run shares what."""
    recipe = {name: one for name, one in settings["recipe"].items() if name != "seed"}
    changes = [name for names in _CHANGES.values() for name in names]
    bare = {name: one for name, one in recipe.items() if name not in changes}
    yield (), {name: settings[name] for name in ("val", "tests") if name in settings}
    yield (key.model,), {"recipe": bare, "pretrained": settings["pretrained"]}
    yield (key.model, key.arm if key.arm in _CHANGES else ""), {"recipe": recipe}


def _flat(settings: Line) -> dict[str, Any]:
    """`{"recipe": {"steps": 8}}` -> `{"recipe.steps": 8}`, two levels deep."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            found[name] = value
    return found
