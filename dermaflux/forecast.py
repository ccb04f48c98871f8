"""Steps that are forecast instead of computed: the velocity of an item follows a smooth curve.

From the velocities at the last computed steps the next is extrapolated, as a polynomial in sigma,
and costs nothing beside a forward pass of the transformer. The idea is TaylorSeer's (Liu et al.,
arXiv 2503.06923), here on the whole output, so that no engine has to know of it. How far a curve
may be followed is asked of each item at each step, as solvers of differential equations do it that
choose their own step (Shampine and Gordon, 1975): polynomials of one degree and of the next are
both drawn through what is known, and as long as they differ by less than `MOST_ERROR` of the
velocity the lower one is taken. A step is computed where they differ by more. It also puts right
what was forecast before it: those steps are taken again along the polynomial through the new
velocity, which costs a sum.

    >>> forecast = Forecast(schedule.sigmas(20, 64))
    >>> forecast.at(7)          # a velocity, or None: that step has to be computed
    >>> tokens += forecast.computed(7, velocity)

All of it is one item's own and in a fixed order of sums: an image depends on its request alone.

How much is lost is measured by `python -m benchmarks.quality`, beside a control of fewer steps in
the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from dermaflux.flow import Floats

MOST_ERROR: Final = 0.1
"""Share of the velocity by which two forecasts may differ. Chosen on the embedded default: with a
tenth about half of 20 steps are computed, and no more is lost than int8 loses at worst."""
FIRST: Final = 3
"""Steps at the start that are computed: where all is noise the velocity turns the most, and two
forecasts that can be compared need three points."""
IN_A_ROW: Final = 8
"""Steps that are forecast without one that is computed, at most, however straight the curve is."""
BOUNDS: Final[Mapping[str, float]] = {
    "most_error": MOST_ERROR,
    "first": FIRST,
    "in_a_row": IN_A_ROW,
}
"""All that decides what is forecast, for the record of whoever draws."""
_POINTS: Final = 3
"""Computed velocities that are kept: parabolas. Differences of more neighbours have more of a
quantized transformer's noise than of the curve's bend."""


class Forecast:
    """The velocities of one item, float32 [T, D], at the steps that were computed.

    `sigmas` float32 [steps + 1] is the item's schedule.
    """

    def __init__(self, sigmas: Floats) -> None:
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._known: list[tuple[float, Floats]] = []
        self._taken: list[int] = []
        self._moved: Floats | None = None
        self._computed = 0

    @property
    def calls(self) -> int:
        """Steps that were computed."""
        return self._computed

    def at(self, step: int) -> Floats | None:
        """The velocity at the next step, from 0; None where it has to be computed.

        Asking changes nothing. The last step is never forecast, so that all are put right.
        """
        last = len(self._sigmas) - 2
        if self._computed < FIRST or step >= last or len(self._taken) >= IN_A_ROW:
            return None
        sigma = self._sigmas[step]
        # Through the last velocity, the last two, and the last three.
        by_degree = [self._through(count, sigma) for count in range(1, len(self._known) + 1)]
        errors = [_size(b - a) for a, b in zip(by_degree, by_degree[1:], strict=False)]
        degree = errors.index(min(errors))
        if errors[degree] > MOST_ERROR * _size(self._known[-1][1]):
            return None
        return by_degree[degree]

    def taken(self, step: int, velocity: Floats) -> None:
        """A step was made with what `at` gave."""
        moved = self._width(step) * velocity
        self._moved = moved if self._moved is None else self._moved + moved
        self._taken.append(step)

    def computed(self, step: int, velocity: Floats) -> Floats | None:
        """A step's velocity was computed. What has to be added to the tokens, which stand after
        steps that were forecast, to put those right; None where none was."""
        self._known = [*self._known[1 - _POINTS :], (self._sigmas[step], velocity.copy())]
        self._computed += 1
        if self._moved is None:
            return None
        # One sum over velocities instead of one over steps: the weights are summed before.
        rows = [_weights([s for s, _ in self._known], self._sigmas[one]) for one in self._taken]
        shares = [
            sum(
                float(self._width(one)) * row[point]
                for one, row in zip(self._taken, rows, strict=True)
            )
            for point in range(len(self._known))
        ]
        right = _sum(shares, [known for _, known in self._known])
        correction: Floats = right - self._moved
        self._taken, self._moved = [], None
        return correction

    def _through(self, points: int, sigma: float) -> Floats:
        known = self._known[-points:]
        return _sum(_weights([s for s, _ in known], sigma), [velocity for _, velocity in known])

    def _width(self, step: int) -> np.float32:
        return np.float32(self._sigmas[step + 1] - self._sigmas[step])


def _weights(known: Sequence[float], sigma: float) -> list[float]:
    """Lagrange's: what each known point counts for at `sigma` in the polynomial through all."""
    weights = []
    for one in known:
        weight = 1.0
        for other in known:
            if other != one:
                weight *= (sigma - other) / (one - other)
        weights.append(weight)
    return weights


def _sum(weights: Sequence[float], velocities: Sequence[Floats]) -> Floats:
    total = np.float32(weights[0]) * velocities[0]
    for weight, velocity in zip(weights[1:], velocities[1:], strict=True):
        total = total + np.float32(weight) * velocity
    return total


def _size(values: Floats) -> float:
    """Root mean square, summed by numpy in an order of its own, which no batch changes."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
