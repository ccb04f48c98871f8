"""Who draws the pictures that are compared, and the controls that they are held against.

    >>> measure(sides, Asked(prompts, seed=0), rounds=16)["tier cached"]    # seconds, and pictures
    >>> controls(sides, variants)["tier cached"]["fewer_steps_same_engine"]
    'openvino-cpu int8'

Part of `python -m benchmarks.quality`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from benchmarks.measuring import alternate
from benchmarks.stages import Spent, draw
from benchmarks.variants import Variant
from dermaflux.decode import Pixels
from dermaflux.pipeline import Pipeline
from dermaflux.tiers import tier

SAME_CALLS: Final = "fewer_steps_same_calls"
"""The control that is given as many calls of the transformer, not as much time."""


@dataclass(frozen=True)
class Asked:
    """Prompts, the seed of the first, and the pixels of both sides; the bundle's if not given."""

    prompts: Sequence[str]
    seed: int
    size: int | None = None


@dataclass
class Side:
    """One who draws: what it drew and what that took, by number of the prompt."""

    pipeline: Pipeline
    steps: int
    spent: list[Spent] = field(default_factory=list)
    made: dict[int, Pixels] = field(default_factory=dict)

    def draw(self, asked: Asked, number: int) -> None:
        """The image of a prompt. Seeds are the same for every side."""
        request = self.pipeline.request(
            asked.prompts[number], asked.seed + number, self.steps,
            height=asked.size, width=asked.size,
        )  # fmt: skip
        spent, (self.made[number],) = draw(self.pipeline, [request])
        self.spent.append(spent)

    def fewer(self, seconds: float) -> int:
        """Steps that it does in so long, beside all that is not a step: 1 to all of them."""
        step = statistics.median(one.seconds["denoise"] for one in self.spent) / self.steps
        rest = statistics.median(one.total - one.seconds["denoise"] for one in self.spent)
        return min(self.steps, max(1, math.floor((seconds - rest) / step)))


def measure(sides: Mapping[str, Side], asked: Asked, rounds: int) -> dict[str, list[float]]:
    """Seconds of every side by round, without the one that warms up; what each drew and what its
    stages took stays with it."""
    for side in sides.values():
        side.spent.clear()
    calls: dict[str, Callable[[int], object]] = {
        name: partial(side.draw, asked) for name, side in sides.items()
    }
    seconds = alternate(calls, rounds, warm_up=1)
    for side in sides.values():
        del side.spent[0]
    return seconds


def controls(sides: Mapping[str, Side], variants: Sequence[Variant]) -> dict[str, dict[str, str]]:
    """By variant and kind the sides that its controls are drawn with: the fastest in fp32, and, for
    a tier that forecasts, the side of the same engine and precision that does not."""
    engines = {one.name: sides[one.name].pipeline.engines["transformer"] for one in variants}
    guessing = {one.name for one in variants if one.tier is not None and forecasts(one.tier)}
    exact = [name for name, one in engines.items()
             if one.precision == "fp32" and name not in guessing]  # fmt: skip
    fastest = min(exact, key=lambda name: statistics.median(s.total for s in sides[name].spent))
    found: dict[str, dict[str, str]] = {}
    for one in variants[1:]:
        # What is as good as the reference needs no control.
        found[one.name] = {} if one.name in exact else {"fewer_steps_fp32": fastest}
        same = f"{engines[one.name].name} {engines[one.name].precision}"
        if one.name in guessing and same in sides:
            found[one.name] |= {"fewer_steps_same_engine": same, SAME_CALLS: same}
    return found


def fewer_steps(kind: str, base: Side, variant: Side) -> int:
    """Steps of a control: those of the variant's calls, or as many as fit in its time."""
    calls = [one.calls for one in variant.spent if one.calls is not None]
    if kind == SAME_CALLS and calls:
        return round(statistics.median(calls))
    return base.fewer(statistics.median(one.total for one in variant.spent))


def forecasts(name: str) -> bool:
    """Whether a tier forecasts steps instead of computing them."""
    return tier(name).forecast
