"""Which pictures a step sees, their noise and its share: functions of the seed and the step alone.

Nothing depends on how many processes there are, on what was drawn for another picture, or on a
generator's state that a resumed run would have to restore.

    >>> draws = Draws(items, seed=0, batch=4, turns=4, dropout=0.1)
    >>> batch = draws.batch(17)
    >>> batch.items, batch.bucket
    (array([3, 50, 7, 12]), (128, 128))

A step draws a bucket in proportion to the weight in it, then for each picture a stratum, then the
stratum's next picture: every stratum (label, say) is drawn equally often over all buckets, and no
picture of a stratum a second time before all others of its bucket were seen. What a step costs
does not depend on how many pictures there are: 393 of 401,059 positives are one shuffled list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from training.lora.corpus import Bucket, Item

_STEP: Final = 1
_ORDER: Final = 2
_NOISE: Final = 3
"""Purposes: keys of independent streams."""


@dataclass(frozen=True)
class Batch:
    """One optimizer step's pictures, all of one bucket.

    Attributes:
        items: int64 [B], places in the list of items.
        turns: int64 [B], which flip of each.
        dropped: bool [B], where the text is left out.
        uniform: float64 [B] in 0..1, stratified over the batch: what noise shares are made of.
    """

    bucket: Bucket
    items: NDArray[np.int64]
    turns: NDArray[np.int64]
    dropped: NDArray[np.bool_]
    uniform: NDArray[np.float64]


def _random(*key: int) -> np.random.Generator:
    """Philox keyed by numbers: the same ones, the same stream, on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def noise(seed: int, step: int, position: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise of the picture at `position` of a step's whole batch."""
    return _random(seed, _NOISE, step, position).standard_normal(shape, dtype=np.float32)


class Draws:
    """Batches of `batch` pictures; see the module. `counters` is all that changes."""

    def __init__(
        self, items: Sequence[Item], *, seed: int, batch: int, turns: int, dropout: float
    ) -> None:
        self._seed, self._batch, self._turns, self._dropout = seed, batch, turns, dropout
        cells: dict[Bucket, dict[tuple[str, ...], list[int]]] = {}
        sizes: dict[tuple[str, ...], int] = {}
        for place, item in enumerate(items):
            cells.setdefault(item.bucket, {}).setdefault(item.stratum, []).append(place)
            sizes[item.stratum] = sizes.get(item.stratum, 0) + 1
        balanced = bool(items[0].stratum)
        self.strata: Mapping[tuple[str, ...], int] = sizes
        self._buckets = list(cells)
        self._strata = [list(cells[bucket]) for bucket in self._buckets]
        self._places = [
            [np.array(cells[bucket][stratum]) for stratum in strata]
            for bucket, strata in zip(self._buckets, self._strata, strict=True)
        ]
        # A picture weighs one over its stratum's size; not balanced, all weigh the same.
        weights = [
            np.array([len(p) / (sizes[s] if balanced else 1) for p, s in zip(ps, ss, strict=True)])
            for ps, ss in zip(self._places, self._strata, strict=True)
        ]
        totals = np.array([weight.sum() for weight in weights])
        self._of_bucket = np.cumsum(totals / totals.sum())
        self._of_stratum = [np.cumsum(weight / weight.sum()) for weight in weights]
        self.counters = [[0] * len(strata) for strata in self._strata]
        """How many were drawn of each stratum of each bucket: saved and restored with a run."""
        self._orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}

    def batch(self, step: int) -> Batch:
        """The pictures of a step; moves the counters on, so steps are asked for in order."""
        random = _random(self._seed, _STEP, step)
        bucket = _pick(self._of_bucket, random.random())
        strata = [_pick(self._of_stratum[bucket], x) for x in random.random(self._batch)]
        items = np.array([self._next(bucket, stratum) for stratum in strata], dtype=np.int64)
        turns = random.integers(self._turns, size=self._batch)
        dropped = random.random(self._batch) < self._dropout
        # Kingma et al., Variational diffusion models (arXiv 2107.00630), I.1: each is uniform, and
        # together they leave no gap, which takes much of the loss's variance away.
        parts = (random.random() + np.arange(self._batch) / self._batch) % 1.0
        return Batch(self._buckets[bucket], items, turns, dropped, random.permutation(parts))

    def _next(self, bucket: int, stratum: int) -> int:
        places = self._places[bucket][stratum]
        count = self.counters[bucket][stratum]
        self.counters[bucket][stratum] = count + 1
        turn, place = divmod(count, len(places))
        known = self._orders.get((bucket, stratum))
        if known is None or known[0] != turn:
            random = _random(self._seed, _ORDER, bucket, stratum, turn)
            known = (turn, random.permutation(places))
            self._orders[bucket, stratum] = known
        return int(known[1][place])


def _pick(edges: NDArray[np.float64], x: float) -> int:
    return min(int(np.searchsorted(edges, x, side="right")), len(edges) - 1)
