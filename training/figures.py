"""A figure of a report: what was measured, on how much, how sure, against which goal.

Whether a goal is met is computed, never written: a missed goal stands in the report as missed.

    >>> Figure("black", "black asked for or not, AUC", 0.81, 64, goal=0.85).met
    False

Intervals are percentile bootstraps (Efron, 1979): `resampled` draws how often each item counts, and
a statistic takes such counts, so that figures that share items (pairs, one set of real images) are
drawn together.

    >>> wins = comparison(present, absent)
    >>> counts = resampled(64, np.random.default_rng(0))
    >>> auc(wins), interval(auc(wins, counts, counts))
    (array([0.87]), (0.81, 0.92))
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Needs = Literal["at least", "at most", "above"]

DRAWS: Final = 1000
_HOLDS: Final = {"at least": operator.ge, "at most": operator.le, "above": operator.gt}


@dataclass(frozen=True)
class Figure:
    """One line of a report.

    `value` is None where nothing could be measured; then `note` says why. `interval` is 95 %.
    `beside` are the numbers without which the value means little, by what they are.
    """

    key: str
    what: str
    value: float | None
    n: int
    interval: tuple[float, float] | None = None
    goal: float | None = None
    needs: Needs = "at least"
    beside: Mapping[str, float | None] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal. What was not measured is not met."""
        if self.goal is None:
            return None
        return self.value is not None and bool(_HOLDS[self.needs](self.value, self.goal))

    def document(self) -> dict[str, Any]:
        """For JSON; numbers to four digits."""
        return {
            "key": self.key,
            "what": self.what,
            "value": _rounded(self.value),
            "n": self.n,
            "interval": None if self.interval is None else [_rounded(v) for v in self.interval],
            "goal": None if self.goal is None else f"{self.needs} {self.goal:g}",
            "met": self.met,
            "beside": {name: _rounded(value) for name, value in self.beside.items()},
            "note": self.note,
        }


def kept(document: Mapping[str, Any], figure: Figure, note: str) -> Figure:
    """`figure` with the numbers that an earlier report's `document` holds for it, and a note."""
    span = document["interval"]
    return replace(
        figure,
        what=document["what"],
        value=document["value"],
        n=document["n"],
        interval=None if span is None else (span[0], span[1]),
        beside=document["beside"],
        note=note,
    )


def table(figures: Iterable[Figure]) -> str:
    """A Markdown table, one line per figure."""
    lines = [
        "| figure | value (95 % interval) | n | goal | met | beside |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures:
        value = _short(figure.value)
        if figure.interval is not None:
            value += f" ({_short(figure.interval[0])} to {_short(figure.interval[1])})"
        goal = "" if figure.goal is None else f"{figure.needs} {figure.goal:g}"
        met = {None: "", True: "yes", False: "**no**"}[figure.met]
        beside = [f"{name} {_short(number)}" for name, number in figure.beside.items()]
        beside += [figure.note] if figure.note else []
        cells = (figure.what, value, str(figure.n), goal, met, "; ".join(beside))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _short(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def resampled(count: int, random: np.random.Generator, draws: int = DRAWS) -> Floats:
    """How often each of `count` items is drawn in each bootstrap sample: [draws, count]."""
    return random.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def interval(values: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrapped values, NaN (a draw of one class alone) left out."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def comparison(positive: Floats, negative: Floats) -> Floats:
    """[P, N]: 1 where the positive is larger, 1/2 where they are equal."""
    larger = positive[:, None] > negative[None]
    return np.asarray(larger + 0.5 * (positive[:, None] == negative[None]))


def auc(wins: Floats, positive: Floats | None = None, negative: Floats | None = None) -> Floats:
    """Area under the ROC curve (Mann and Whitney, 1947) of a `comparison` [P, N]: [draws].

    `positive` [draws, P] and `negative` [draws, N] are counts; without them, one draw of all items.
    The same counts for both resample pairs.
    """
    positive = np.ones((1, wins.shape[0])) if positive is None else positive
    negative = np.ones((1, wins.shape[1])) if negative is None else negative
    total = positive.sum(1) * negative.sum(1)
    return np.asarray(((positive @ wins) * negative).sum(1) / np.where(total > 0, total, np.nan))
