"""What a classifier's run saves, and which saved run may go on.

A run goes on where data, pictures, recipe and start are those that it began with. Steps draw from
numbers of their own (`training.draws`), so weights, optimizers and counters are the whole state.

    >>> history = check(samples, recipe, Path("runs/vit.pt"), None)     # reads no picture
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from training import data, generated, states
from training.heads import Supervised
from training.pretrained import Pretrained
from training.recipe import Recipe, defaults

RESUME: Final = "delete it, or give --work another file"


@dataclass
class Progress:
    """What changes from step to step. `best` are the weights that validation liked most."""

    model: Supervised
    average: Supervised
    optimizers: list[torch.optim.Optimizer]
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_value: float = float("inf")
    since: int = 0

    def state(self) -> dict[str, Any]:
        """For a state file."""
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses, "best": self.best, "best_value": self.best_value,
            "since": self.since,
        }  # fmt: skip

    def take(self, state: Mapping[str, Any]) -> None:
        """Become what `state` gave. Raises what a mapping of another kind raises."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = [float(loss) for loss in state["losses"]]
        self.best = state.get("best")
        self.best_value = float(state.get("best_value", float("inf")))
        self.since = int(state.get("since", 0))


def written(
    file: Path, progress: Progress, recipe: Recipe, history: states.History,
    samples: Sequence[data.Sample],
) -> None:  # fmt: skip
    """Save a run, whole or not at all."""
    states.write(file, {
        **progress.state(), "recipe": recipe.fixed(), "history": history.state(),
        "pictures": fingerprint(samples),
    })  # fmt: skip


def fingerprint(samples: Sequence[data.Sample]) -> str:
    """Which pictures are learnt, whatever folder they are in: their count, then a checksum."""
    lines = "".join(
        f"{s.source}\t{s.group}\t{s.file.name}\t{s.lesion.label}\n" for s in samples
    ).encode()
    return f"{len(samples)} {hashlib.sha256(lines).hexdigest()[:16]}"


def check(
    samples: Sequence[data.Sample], recipe: Recipe, state_file: Path | None,
    start: Path | None = None, weights: Pretrained | None = None,
) -> states.History:  # fmt: skip
    """The history with which a run would begin or go on, without reading any picture.

    Raises:
        DatasetError: a state file cannot be read, or the one to resume is of another run.
    """
    name = "a run without --work" if state_file is None else state_file.name
    begun = None if weights is None else weights.history
    if start is not None:
        begun = _begun(start)
    history = states.History(
        name, tuple(data.licences(samples)), start=begun,
        ingredients=generated.ingredients(samples),
    )  # fmt: skip
    if state_file is None or not state_file.is_file():
        return history
    with states.reading(state_file, RESUME) as state:
        _same_run(state, state_file, history, recipe, fingerprint(samples))
        return replace(states.History.of(state["history"]), name=name)


def _begun(file: Path) -> states.History:
    """The history of another run that its state file holds."""
    with states.reading(file, "give --start a state that training.vit saved with --work") as state:
        return states.History.of(state["history"])


def _same_run(
    state: Mapping[str, Any], file: Path, mine: states.History, recipe: Recipe, pictures: str
) -> None:
    """Refuse to go on with a run that read other data, began elsewhere, or has another recipe."""
    before = states.History.of(state["history"])
    advice = "give --work another file to begin a new run"
    if before.data != mine.data:
        names = ["; ".join(f"{s} ({licence})" for s, licence in h.data) for h in (before, mine)]
        raise data.DatasetError(
            f"{file} is a run on other data: it read {names[0]}, not {names[1]}; {advice}"
        )
    if (old := state.get("pictures", pictures)) != pictures:
        counts = [one.split()[0] for one in (old, pictures)]
        raise data.DatasetError(
            f"{file} is a run on other pictures of the same data ({counts[0]} then, {counts[1]} "
            f"now); {advice}"
        )
    if mine.start is not None and mine.start != before.start:
        starts = [
            "random weights" if h.start is None else f"{h.start.name} at step {h.start.steps}"
            for h in (before, mine)
        ]
        raise data.DatasetError(
            f"{file} is a run that began from {starts[0]}, not from {starts[1]} as --start or "
            f"--pretrained says; leave it out, or {advice}"
        )
    now = recipe.fixed()
    then = {**defaults(), **state["recipe"]}
    if other := [name for name in now if then[name] != now[name]]:
        said = ", ".join(f"{name} {then[name]!r} instead of {now[name]!r}" for name in other)
        raise data.DatasetError(f"{file} is a run of another recipe ({said}); {advice}")
