"""Sides measured against each other on a machine that is not quiet.

The sides take turns, so that what slows the machine slows all alike, and the order turns from round
to round, so that none always follows the same one. A speed-up is a median of ratios within a round,
never a ratio of two medians, and has an interval.

    >>> seconds = alternate({"eager": draw_eager, "ours": draw_ours}, rounds=15)
    >>> ratio(seconds["eager"], seconds["ours"])
    Ratio(median=2.46, low=2.41, high=2.52)
    >>> spread(seconds["ours"])
    {'p50_ms': 127.1, 'p90_ms': 131.8, 'p99_ms': 140.2}
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dermaflux.errors import DermaFluxError

_RESAMPLES: Final = 10_000
_INTERVAL: Final = (0.025, 0.975)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the median over rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


def alternate(
    sides: Mapping[str, Callable[[int], object]], rounds: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call by side: in each of `rounds` rounds every side once.

    A side gets the number of the round, from 0: a seed, say. `warm_up` rounds before, which get 0,
    do not count. Progress goes to stderr.

    Raises:
        DermaFluxError: there is no round to measure.
    """
    if rounds < 1:
        raise DermaFluxError(f"{rounds} rounds measure nothing; use 1 or more")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, rounds):
        for name in turn(tuple(sides), number):
            began = time.perf_counter()
            sides[name](max(number, 0))
            spent = time.perf_counter() - began
            if number >= 0:
                seconds[name].append(spent)
        what = f"round {number + 1} of {rounds}" if number >= 0 else "warm-up"
        print(what, file=sys.stderr)
    return seconds


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: rotated by its number, and backwards every second time around, so that
    neighbours change places too."""
    if not names:
        return []
    start = number % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number // len(names) % 2 else order


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """How many times as fast as `base` the `other` is: seconds of the same rounds, in order.

    The interval is a percentile bootstrap over rounds (Efron, 1979), always with the same
    resamples: equal seconds give equal intervals. Of fewer than six rounds it is no 95 %.

    Raises:
        ValueError: the two are not of the same rounds.
    """
    each = np.array([before / after for before, after in zip(base, other, strict=True)])
    if not len(each):
        raise ValueError("no rounds, no ratio")
    chosen = np.random.default_rng(0).integers(0, len(each), (_RESAMPLES, len(each)))
    low, high = np.quantile(np.median(each[chosen], axis=1), _INTERVAL)
    return Ratio(float(np.median(each)), float(low), float(high))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in ms, interpolated between neighbours: of few values the 99th is the largest."""
    values = np.quantile(seconds, (0.5, 0.9, 0.99))
    return {f"p{p}_ms": round(1e3 * float(v), 3) for p, v in zip((50, 90, 99), values, strict=True)}
