"""State files: what a training run saves, what its weights have seen, and how both are read.

    >>> with states.reading(Path("runs/mini/vit.pt"), "give another file") as state:
    ...     model.load_state_dict(state["model"])

A run's `History` travels in its state file, and the histories of the runs that it started from
travel with it: the data that weights have seen is stated, whatever order the runs came in.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from training import data

# What torch.load and the loading of its content raise for files that are something else.
_UNREADABLE = (OSError, EOFError, TypeError, IndexError, KeyError, ValueError, AttributeError,
               RuntimeError, pickle.UnpicklingError)  # fmt: skip
PRETRAINED: Final = " (pretrained weights)"
"""Ends the source of a pair that stands for weights of others' making, and not for data."""
_LONGEST = 160  # characters of such an error that are shown


@dataclass(frozen=True)
class History:
    """What a run's weights have been through. `data` are the (source, licence) pairs it read.

    `ingredients` say more of those that are no plain data, as entries of a `provenance.json`: of
    weights that it began with, and of generated pictures with what their generator was made of. A
    pair that an entry tells of is that entry's `source`.

    `loss` is that of the label over the last hundred steps. `validation` has what each look at the
    validation pictures found (step, loss, auc), and `kept` the step whose weights are the result.
    """

    name: str
    data: tuple[tuple[str, str], ...]
    steps: int = 0
    seconds: float = 0.0
    start: History | None = None
    loss: float | None = None
    validation: tuple[dict[str, float], ...] = ()
    kept: int | None = None
    # Runs saved before these were are still the same runs.
    ingredients: tuple[Mapping[str, str], ...] = field(default=(), compare=False)

    @property
    def made_of(self) -> list[Mapping[str, str]]:
        """The entries of this run and of all those before it, each once."""
        found = [*(self.start.made_of if self.start else ()), *self.ingredients]
        return [one for place, one in enumerate(found) if one not in found[:place]]

    @property
    def begun(self) -> str:
        """The name of the weights of others' making that the first run began with, or ""."""
        if self.start is not None:
            return self.start.begun
        own = (i for i in self.ingredients if i["kind"] == "weights" and "through" not in i)
        said = (source for source, _ in self.data if source.endswith(PRETRAINED))
        name = next((str(one["name"]) for one in own), None)
        return name if name is not None else next(said, "").removesuffix(PRETRAINED)

    @property
    def saw(self) -> list[tuple[str, str]]:
        """The pairs that this run and all those before it have seen, sorted."""
        return sorted({*self.data, *(self.start.saw if self.start else ())})

    def state(self) -> dict[str, Any]:
        """For a state file."""
        return {
            "name": self.name,
            "data": [list(pair) for pair in self.data],
            "steps": self.steps,
            "seconds": self.seconds,
            "start": None if self.start is None else self.start.state(),
            "loss": self.loss,
            "validation": list(self.validation),
            "kept": self.kept,
            "ingredients": [dict(one) for one in self.ingredients],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """What `state` gave. Raises what a mapping of another kind raises."""
        start = state["start"]
        return cls(
            str(state["name"]),
            tuple((str(source), str(licence)) for source, licence in state["data"]),
            int(state["steps"]),
            float(state["seconds"]),
            None if start is None else cls.of(start),
            # Of runs that were saved before these were.
            state.get("loss"),
            tuple(state.get("validation", ())),
            state.get("kept"),
            tuple(dict(one) for one in state.get("ingredients", ())),
        )

    def document(self) -> dict[str, Any]:
        """For a report: name, steps, hours, and what it saw with all that came before it."""
        return {
            "name": self.name,
            "steps": self.steps,
            "hours": round(self.seconds / 3600, 2),
            "saw": [{"source": source, "licence": licence} for source, licence in self.saw],
            "started_from": None if self.start is None else self.start.document(),
            **({"ingredients": [dict(one) for one in self.made_of]} if self.made_of else {}),
            **({"validation": list(self.validation), "kept_step": self.kept}
               if self.validation else {}),
        }  # fmt: skip


@contextmanager
def reading(file: Path, advice: str) -> Iterator[dict[str, Any]]:
    """A state file's content, to be loaded within the block.

    Raises:
        DatasetError: it is no state file, or the block finds it to be of another kind; one line
            that ends in `advice`.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        yield state
    except _UNREADABLE as error:
        said = " ".join(str(error).split())[:_LONGEST] or "it ends early"
        raise data.DatasetError(
            f"{file} cannot be used as a state ({type(error).__name__}: {said}); {advice}"
        ) from error


def write(file: Path, state: Mapping[str, Any]) -> None:
    """Save a state: the file is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(dict(state), part)
    part.replace(file)
