"""What is to be expected of joining a batch beside first come, from measured costs.

For given arrivals `simulated` goes through them step by step. For endless ones there is theory:
first come, first served is a queue M/G/1, whose mean Pollaczek and Khinchine gave. Those who share
a batch are served at once at a speed that grows with their number; the mean of such sharing does
not depend on how lengths of requests are distributed (Kelly, 1979), so that of a chain of births
and deaths is it. Beyond the limit requests wait in order, which the chain does not tell from
sharing: that part is an approximation.

    >>> long_run(0.8, costs(pipeline, (4, 20), time.monotonic), limit=4)
    0.82
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dermaflux import gains
from dermaflux.gains import Gains
from dermaflux.pipeline import Pipeline

_LONG_QUEUE: Final = 2000  # states of the chain: beyond it they are too rare to matter


@dataclass(frozen=True)
class Cost:
    """What a request of `steps` (from and to, all alike often) takes, as measured alone: seconds of
    a step by batch, and of the `rest`, which batches do not share."""

    steps: tuple[int, int]
    gains: Gains
    rest: float

    def step(self, batch: int) -> float:
        """Seconds of a step of a batch; between measured batches by a line."""
        batches, seconds = zip(*sorted(self.gains.seconds.items()), strict=True)
        return float(np.interp(batch, batches, seconds))

    def seconds(self, steps: float, batch: int = 1) -> float:
        """Of the machine's time for one request in a batch."""
        return steps * self.step(batch) / batch + self.rest

    @property
    def counts(self) -> range:
        """The numbers of steps there are."""
        return range(self.steps[0], self.steps[1] + 1)


def long_run(share: float, cost: Cost, limit: int) -> float | None:
    """Mean latency with `limit` over that of first come; None where first come has no mean.

    `share` is arrivals over what first come can do.
    """
    if share >= 1:
        return None
    alone = [cost.seconds(count) for count in cost.counts]
    mean, square = statistics.fmean(alone), statistics.fmean(s * s for s in alone)
    # Both sides in units of a request's time alone.
    first_come = 1 + share / (1 - share) * square / mean**2 / 2
    usual = statistics.fmean(cost.counts)
    # Probability of n requests here, from that of n - 1: arrivals over the speed of a batch of n.
    weight, weights = 1.0, [1.0]
    for here in range(1, _LONG_QUEUE):
        weight *= share * cost.seconds(usual, min(here, limit)) / mean
        weights.append(weight)
    present = sum(n * w for n, w in enumerate(weights)) / sum(weights)
    return present / share / first_come


def costs(pipeline: Pipeline, steps: tuple[int, int], clock: Callable[[], float]) -> Cost:
    """Measure what requests take: a step by batch, and the least that the rest took."""
    found = gains.measure(pipeline, clock=clock)
    spent = []
    for seed in range(4):
        begin = clock()
        pipeline.generate([pipeline.request("a lesion", seed=seed, steps=1)])
        spent.append(clock() - begin)
    return Cost(steps, found, max(0.0, min(spent) - found.seconds[1]))


def simulated(dues: Sequence[float], steps: Sequence[int], limit: int, cost: Cost) -> list[float]:
    """Latency of requests that are due at `dues`, ascending, and take `steps`."""
    now, waiting, left = 0.0, list(range(len(dues)))[::-1], dict[int, int]()
    latency = dict[int, float]()
    while waiting or left:
        if not left:
            now = max(now, dues[waiting[-1]])
        while waiting and len(left) < limit and dues[waiting[-1]] <= now:
            index = waiting.pop()
            left[index] = steps[index]
        now += cost.step(len(left))
        left = {index: count - 1 for index, count in left.items()}
        done = [index for index, count in left.items() if count == 0]
        now += cost.rest * len(done)
        for index in done:
            del left[index]
            latency[index] = now - dues[index]
    return [latency[index] for index in range(len(dues))]
