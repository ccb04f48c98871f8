"""What the figures say, in plain words that follow from them and go no further.

    >>> changed("adding 1.75 times as many synthetic ones (mini)", 500, "AUC", found)
    'With 500 real pictures, adding 1.75 times as many synthetic ones (mini) changed AUC by -0.004
    (95 % interval -0.020 to +0.010, 5 seeds): no gain is shown, nor a loss.'

A gain is shown where the whole interval is above zero as it is printed, rounded outwards, and there
are three seeds or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from training.experiment.config import ADDED, CLASSIC, ONLY, REAL, UPPER, WEIGHTS
from training.experiment.key import Key

FEW: Final = 3
"""Seeds below which an interval says little of the training's own chance."""


def signed(value: float) -> str:
    """Three digits after the point, and a sign."""
    return f"{value:+.3f}".replace("-", "−") if round(value, 3) else "0.000"


def outward(interval: Sequence[float]) -> tuple[float, float]:
    """To three digits, never narrower."""
    # A tenth of a last digit of what was rounded to four: 0.002 must stay 0.002.
    low, high = interval
    return math.floor(low * 1000 + 1e-6) / 1000, math.ceil(high * 1000 - 1e-6) / 1000


def verdict(low: float, high: float) -> str:
    """What an interval of a difference shows."""
    if low > 0:
        return "a gain is shown"
    if high < 0:
        return "a loss is shown"
    return "no gain is shown, nor a loss"


def doing(cell: Key) -> str:
    """What a cell does that real pictures alone do not."""
    ratio = f"{cell.ratio:g} times as many synthetic ones ({cell.generator})"
    if cell.ratio == 1:
        ratio = f"as many synthetic ones ({cell.generator})"
    return {
        ADDED: f"adding {ratio}",
        ONLY: f"learning from {ratio} instead of them",
        CLASSIC: "stronger classic augmentation",
        WEIGHTS: "class weights",
        UPPER: f"learning from all real pictures that {cell.generator} saw",
        REAL: "real pictures alone",
    }[cell.arm]


def changed(what: str, size: int, measure: str, found: Mapping[str, Any]) -> str:
    """The sentence of one comparison with real pictures alone."""
    begin = f"With {size:,} real pictures, {what}"
    if found["value"] is None or found["interval"] is None:
        return f"{begin}: {measure} cannot be compared ({found.get('note', 'no value')})."
    low, high = outward(found["interval"])
    seeds = found["seeds"]
    shown = verdict(low, high) if seeds >= FEW else "too few seeds to show anything"
    return (
        f"{begin} changed {measure} by {signed(found['value'])} (95 % interval {signed(low)} to "
        f"{signed(high)}, {seeds} seed{'s' * (seeds > 1)}): {shown}."
    )


NO_CONTROL: Final = (
    "Real pictures alone were not run in two numbers by the same seeds, so there is no sign that "
    "this experiment could show a gain from more pictures, real or synthetic."
)


def control(few: int, many: int, measure: str, found: Mapping[str, Any]) -> str:
    """The sentence on more real pictures: what cannot show their gain cannot show another's."""
    begin = f"Positive control: {many:,} real pictures in place of {few:,}"
    nothing = (
        "this experiment could not have shown a gain from more real pictures either, so nothing "
        "can be said of gains from synthetic ones."
    )
    if found["value"] is None or found["interval"] is None:
        note = found.get("note", "no interval")
        return f"{begin}: {measure} cannot be compared ({note}); {nothing}"
    low, high = outward(found["interval"])
    seeds = found["seeds"]
    shown = f"changed {measure} by {signed(found['value'])} (95 % interval {signed(low)} to "
    shown += f"{signed(high)}, {seeds} seed{'s' * (seeds > 1)}): "
    if seeds < FEW:
        return f"{begin} {shown}too few seeds to show anything; {nothing}"
    if low > 0:
        return f"{begin} {shown}a gain is shown, so this experiment can show one of that size."
    return f"{begin} {shown}{verdict(low, high)}; {nothing}"


def summed(found: Sequence[Mapping[str, Any]], measure: str) -> str:
    """How many comparisons show what, beside how many would by chance alone."""
    enough = [one for one in found if one["seeds"] >= FEW]
    known = [outward(one["interval"]) for one in enough if one["interval"] is not None]
    up = sum(low > 0 for low, _ in known)
    down = sum(high < 0 for _, high in known)
    chance = 0.025 * len(known)
    if not known:
        return f"No comparison of {measure} has an interval over {FEW} seeds or more."
    plural = "s" * (len(known) > 1)
    return (
        f"Of {len(known)} comparison{plural} of added synthetic pictures with real ones alone, "
        f"{up} show{'s' * (up == 1)} a gain in {measure} and {down} a loss; if nothing had any "
        f"effect, about {chance:.1f} of each would be expected by chance."
    )
