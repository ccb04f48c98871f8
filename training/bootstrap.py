"""95 % intervals by drawing lesions or patients, never single pictures, and paired differences.

Pictures of one lesion resemble each other: drawn singly they would seem more than they are, and the
interval too narrow. So whole groups are drawn with replacement (the cluster bootstrap; Field and
Welsh, 2007), and the interval is the middle of the draws (percentile; Efron, 1979).

    >>> measured(lambda w: {"auc": metrics.auc(p, labels, w)}, groups)
    {'auc': {'value': 0.8612, 'interval': [0.8301, 0.8904]}}
    >>> difference(metrics.auc, p, others, labels, groups)
    {'value': 0.0312, 'interval': [0.0051, 0.0571], 'above_zero': 0.991}

The same groups, seed and number of draws give the same draws: figures of one call share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.figures import Floats
from training.metrics import UNDEFINED, Metric
from training.roc import Labels

DRAWS: Final = 2000
_CELLS: Final = 2_000_000  # draws x pictures at once: 16 MB an array
_SCARCE: Final = 0.5  # an interval needs this share of the draws to have a value
_MIDDLE: Final = (0.025, 0.975)

Statistics = Callable[[Floats | None], Mapping[str, Floats]]
"""Figures [D] by name, of how often each picture counts in each draw [D, N] (None: once)."""


def drawn(groups: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Iterator[Floats]:
    """How often each of N pictures stands in each draw of as many groups as there are: [d, N].

    `groups` [N] names each picture's lesion or patient. Comes in several parts, `draws` in all.
    """
    names, rows = np.unique(np.asarray(groups), return_inverse=True)
    count, random = len(names), np.random.default_rng(seed)
    part = max(1, _CELLS // max(len(rows), 1))
    for start in range(0, draws, part):
        size = min(part, draws - start)
        picked = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        often = np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)
        yield often.astype(np.float64)[:, rows]


def measured(
    statistics: Statistics, groups: ArrayLike, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Value and 95 % interval of each figure, to four digits.

    What has no value is None and has a `note` that says why; so has an interval that cannot be
    given. Nothing here is NaN.
    """
    groups = np.asarray(groups)
    values = {name: float(found[0]) for name, found in statistics(None).items()}
    few = None if len(np.unique(groups)) > 1 else "one lesion or patient alone: no interval"
    parts: dict[str, list[Floats]] = {name: [] for name in values}
    if few is None and any(np.isfinite(value) for value in values.values()):
        for weights in drawn(groups, draws, seed):
            for name, found in statistics(weights).items():
                parts[name].append(found)
    return {name: _entry(name, value, parts[name], few) for name, value in values.items()}


def nothing(names: tuple[str, ...] | Mapping[str, Any], note: str) -> dict[str, dict[str, Any]]:
    """Entries as `measured` makes them, of figures that cannot be measured because of `note`."""
    return {name: {"value": None, "interval": None, "note": note} for name in names}


def _entry(name: str, value: float, parts: list[Floats], few: str | None) -> dict[str, Any]:
    if not np.isfinite(value):
        return nothing((name,), UNDEFINED.get(name, "needs pictures of both classes"))[name]
    entry: dict[str, Any] = {"value": rounded(value), "interval": None}
    if few is not None:
        return entry | {"note": few}
    found = np.concatenate(parts)
    known = found[np.isfinite(found)]
    if len(known) < _SCARCE * len(found):
        return entry | {"note": f"only {len(known)} of {len(found)} draws have a value"}
    return entry | {"interval": [rounded(float(v)) for v in np.quantile(known, _MIDDLE)]}


def rounded(value: float) -> float:
    """To four digits after the point, and no -0.0."""
    return round(float(value), 4) + 0.0


def difference(
    metric: Metric, first: NDArray[Any], second: NDArray[Any], labels: Labels, groups: ArrayLike,
    draws: int = DRAWS, seed: int = 0, *, draw_seeds: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """`metric` of `first` less that of `second` on the same pictures, with a paired interval.

    Scores are [N], or [S, N] of S training runs, whose mean is compared. Both sides see the same
    drawn pictures. With several runs a side these are drawn too, unless `draw_seeds` is false, for
    a run is as much a matter of chance as a picture (Bouthillier et al., 2021); as many runs on
    both sides are taken for pairs (the same seeds, the same subsets). Few runs make this interval
    somewhat too narrow: five vary by 4/5 of what many would. `above_zero` is the share of draws in
    which `first` is better, ties by half.
    """
    sides = [np.atleast_2d(np.asarray(side)) for side in (first, second)]
    once = [float(np.mean([metric(run, labels, None)[0] for run in side])) for side in sides]
    if not np.isfinite(once).all():
        note = UNDEFINED.get(getattr(metric, "__name__", ""), "needs pictures of both classes")
        return {"value": None, "interval": None, "above_zero": None, "note": note}
    random = np.random.default_rng([seed, 1])
    parts: list[Floats] = []
    for weights in drawn(groups, draws, seed):
        runs = [np.stack([metric(run, labels, weights) for run in side]) for side in sides]
        shares = [_drawn_runs(len(run), len(weights), random, draw_seeds) for run in runs]
        if len(runs[0]) == len(runs[1]):
            shares[1] = shares[0]
        means = [(share.T * run).sum(0) for share, run in zip(shares, runs, strict=True)]
        parts.append(means[0] - means[1])
    few = None if len(np.unique(np.asarray(groups))) > 1 else "one lesion or patient alone"
    entry = _entry("difference", once[0] - once[1], parts, few)
    found = np.concatenate(parts)
    found = found[np.isfinite(found)]
    above = np.mean(found > 0) + np.mean(found == 0) / 2 if len(found) else None
    return entry | {"above_zero": None if above is None else rounded(float(above))}


def _drawn_runs(runs: int, draws: int, random: np.random.Generator, vary: bool) -> Floats:
    """The share of each of `runs` runs in each draw: [draws, runs]."""
    if not vary or runs == 1:
        return np.full((draws, runs), 1 / runs)
    return np.asarray(random.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs)
