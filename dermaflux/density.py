"""How usual a vector is among those that a density was fitted to: a mixture of Gaussians in numpy.

    normal scores (by each number's own quantiles) -> standard -> principal axes -> mixture

One component over all axes is the Mahalanobis distance. The fit is `training.intake`'s; here it is
read and evaluated, so that a service needs neither torch nor scikit-learn.

    >>> density = Density.of({name: array, ...})
    >>> density.score(vector)                   # a logarithm: the lower, the stranger
    -31.4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.errors import BundleError
from dermaflux.flow import Floats

LARGEST: Final = 8.0
_ROWS: Final = 64
"""Vectors that are compared with all knots at once: of 300 numbers and 33 knots 600 kB."""


@dataclass(frozen=True)
class Density:
    """Float32 arrays over D numbers, K axes and C components.

    `knots` [Q, D] are each number's quantiles at the normal scores `scores` [Q], both rising;
    `spread` [D] is its scale beyond them. `mean` and `deviation` [D] make scores standard, `axes`
    [K, D] and `origin` [K] project them, `weights` [C] (logarithms), `means` [C, K] and `factors`
    [C, K, K] are the mixture: the inverse covariance is a factor times its transpose.
    """

    scores: Floats
    knots: Floats
    spread: Floats
    mean: Floats
    deviation: Floats
    axes: Floats
    origin: Floats
    weights: Floats
    means: Floats
    factors: Floats

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Density:
        """Raises:
        BundleError: an array is missing, of another type or shape, or not finite.
        """
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in arrays]:
            raise BundleError(f"the statistics have no {missing[0]}")
        found = cls(**{name: arrays[name] for name in names})
        shapes = [array.shape for array in vars(found).values()]
        if found.knots.ndim != 2 or found.means.ndim != 2:
            raise BundleError(f"the statistics have shapes {shapes}, which do not fit together")
        (q, d), (c, k) = found.knots.shape, found.means.shape
        needed = [(q,), (q, d), (d,), (d,), (d,), (k, d), (k,), (c,), (c, k), (c, k, k)]
        if shapes != needed or min(q, d, c, k) < 1:
            raise BundleError(f"the statistics have shapes {shapes}; {needed} are needed")
        for name, array in vars(found).items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise BundleError(f"{name} of the statistics needs finite float32 numbers")
        return found

    def score(self, vector: Floats) -> float:
        """The logarithm of the density at a vector [D]."""
        return float(self.score_all(vector[None])[0])

    def score_all(self, vectors: Floats) -> NDArray[np.float64]:
        """The same for [N, D] -> [N]."""
        places = self.places(vectors)
        # Of each component [N, K] and a number: all of them at once, for a service asks of one
        # vector at a time, where calls of numpy are what takes the time.
        away = (places - self.means[:, None]) @ self.factors.astype(np.float64)
        diagonals = np.abs(self.factors.diagonal(axis1=1, axis2=2)).astype(np.float64)
        constants = self.weights.astype(np.float64) + np.log(diagonals).sum(1)
        constants -= 0.5 * places.shape[1] * math.log(2 * math.pi)
        logs = constants[:, None] - 0.5 * (away**2).sum(2)
        return np.asarray(np.logaddexp.reduce(logs, axis=0), np.float64)

    def standard(self, vectors: Floats) -> NDArray[np.float64]:
        """Normal scores with mean 0 and deviation 1 over what the density was fitted to. Beyond
        `LARGEST` they count as that: one number far out must not outweigh all others."""
        standard = (self.normal(vectors) - self.mean) / self.deviation
        return np.asarray(standard.clip(-LARGEST, LARGEST), np.float64)

    def places(self, vectors: Floats) -> NDArray[np.float64]:
        """Where vectors lie on the axes, [N, D] -> [N, K]."""
        return np.asarray(self.standard(vectors) @ self.axes.T.astype(np.float64) - self.origin)

    def normal(self, vectors: Floats) -> NDArray[np.float64]:
        """Each number by its own quantiles as a normal one; beyond them it goes on in a line."""
        values = vectors.astype(np.float64)
        knots, scores = self.knots.astype(np.float64), self.scores.astype(np.float64)
        found = np.empty(values.shape, np.float64)
        for start in range(0, len(values), _ROWS):
            rows = slice(start, start + _ROWS)
            found[rows] = _interpolated(values[rows], knots, scores)
        beyond = np.maximum(values - knots[-1], 0) - np.maximum(knots[0] - values, 0)
        return np.asarray(found + beyond / self.spread.astype(np.float64))


def _interpolated(
    values: NDArray[np.float64], knots: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`np.interp` of [N, D], each column with its own knots [Q, D] and all with scores [Q]: the
    same numbers, without a call a column."""
    last = len(knots) - 1
    # The last knot that is not above the value.
    at = (values[..., None] >= knots.T).sum(-1) - 1
    low = at.clip(0, max(last - 1, 0))
    high = np.minimum(low + 1, last)
    columns = np.arange(knots.shape[1])
    begin, end = knots[low, columns], knots[high, columns]
    with np.errstate(divide="ignore", invalid="ignore"):  # of knots alike: not taken, see below
        between = (scores[high] - scores[low]) / (end - begin) * (values - begin) + scores[low]
    between = np.where(values == begin, scores[low], between)
    return np.asarray(np.where(at < 0, scores[0], np.where(at >= last, scores[last], between)))
