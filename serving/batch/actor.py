"""What runs in a process of a cluster: a maker that holds its engines, and draws block by block.

>>> actor = Actor(tools, attempts=1, seed=0)
>>> actor({"try": [pickle.dumps(one) for one in tries]})["drawn"]    # one `Drawn`, pickled
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from serving.batch.maker import Made, Maker, Tools, Try
from serving.batch.work import after

DEATHS: Final = 3
"""Processes that may die over a block: machines that are taken away cost a picture nothing."""


@dataclass(frozen=True)
class Drawn:
    """What comes back of a block: its items' tries, or `mistake`, the trace of an error of ours."""

    engine: str
    details: Mapping[str, Any]
    made: Sequence[Sequence[Made]] = ()
    mistake: str = ""


class Actor:
    """A maker in a process of the cluster. Items come and go pickled, in columns of bytes."""

    def __init__(self, tools: Tools, attempts: int, seed: int) -> None:
        self._maker = Maker.open(tools)
        self._attempts = attempts
        self._seed = seed

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        drawn = Drawn(self._maker.engine, self._maker.details)
        try:
            tries = [pickle.loads(data) for data in block["try"]]
            made = exhausted(self._maker, tries, self._attempts, self._seed)
            drawn = replace(drawn, made=made)
        except Exception:
            # Not swallowed but carried to `work_on_ray`, which raises it: Ray would leave the block
            # out without a word, as it shall where a process died.
            drawn = replace(drawn, mistake=traceback.format_exc())
        return {"drawn": np.array([pickle.dumps(drawn)], object)}


def exhausted(maker: Maker, tries: Sequence[Try], attempts: int, seed: int) -> list[list[Made]]:
    """What became of each item, try after try until one is kept, failed, or none is left."""
    outcomes: dict[str, list[Made]] = {one.item.name: [] for one in tries}
    while tries:
        made = maker.develop(tries, maker.denoise(tries))
        for one in made:
            outcomes[one.one.item.name].append(one)
        following = (
            None if one.error or not one.verdict.reasons
            else after("rejected", one.one, attempts, seed)
            for one in made
        )  # fmt: skip
        tries = [one for one in following if one is not None]
    return list(outcomes.values())
