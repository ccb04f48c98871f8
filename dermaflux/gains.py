"""What batches gain here: the time of one denoising step by batch, measured, and the batch to use.

Denoising is bound by arithmetic, so a batch of 4 takes almost four times as long as one image, and
everybody in it waits that long. It pays as far as images a second grow, and no further: the limit
is the smallest batch within a twentieth of the best. Steps are timed that are computed, whether or
not others are forecast (`dermaflux.forecast`): those cost next to nothing at any batch.

    >>> measure(pipeline).limit()
    2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dermaflux import flow
from dermaflux.denoise import Batch, Text
from dermaflux.pipeline import Pipeline
from dermaflux.residency import InTurns

NEAR = 0.05
"""Share of the best rate that a smaller batch may lack: less than that nobody notices, while every
item more makes each step longer for all."""
ROUNDS = 3
BUDGET_SECONDS = 20.0
"""Measuring ends where the next batch would go past this: others wait for the engines meanwhile."""


@dataclass(frozen=True)
class Gains:
    """Seconds of one step, the best of the rounds, by batch; ascending, of an image `size`.

    `size` is height and width in pixels.
    """

    size: tuple[int, int]
    seconds: dict[int, float]

    @property
    def rates(self) -> dict[int, float]:
        """Items moved one step a second, by batch."""
        return {batch: batch / seconds for batch, seconds in self.seconds.items()}

    def limit(self, near: float = NEAR) -> int:
        """The smallest batch whose rate is within `near` of the best one's."""
        best = max(self.rates.values())
        return min(batch for batch, rate in self.rates.items() if rate >= (1 - near) * best)


def measure(
    pipeline: Pipeline,
    *,
    rounds: int = ROUNDS,
    budget_seconds: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Gains:
    """What `measuring` knows at its end.

    Raises:
        EngineError: an engine failed, or not even one image fits in memory.
    """
    *_, found = measuring(pipeline, rounds=rounds, budget_seconds=budget_seconds, clock=clock)
    return found


def measuring(
    pipeline: Pipeline,
    *,
    rounds: int = ROUNDS,
    budget_seconds: float = BUDGET_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Gains]:
    """What is known after each step of measuring, so that others can use the engines in between.

    Time a step of the bundle's default size at batches of 1, 2, 4, ... up to what fits.

    Each batch runs once before it counts, since engines prepare for a shape when they first see it.
    The best of the rounds counts: whoever else uses the machine can only make a step longer. Where
    parts take turns in memory nothing is measured: then a batch shares the loading, which outweighs
    all, and the largest that fits is the one to use. The budget is of the steps themselves.

    Raises:
        EngineError: an engine failed, or not even one image fits in memory.
    """
    size = pipeline.defaults.height, pipeline.defaults.width
    most = pipeline.batch(*size)
    if isinstance(pipeline.engines, InTurns):
        yield Gains(size, {most: 1.0})
        return
    (text,) = (pipeline.encode(["a lesion"]),)
    seconds: dict[int, float] = {}
    left = budget_seconds
    for number in range(rounds):
        for batch in _batches(most) if number == 0 else sorted(seconds):
            # A step takes at most in proportion to its batch, so this is what it may cost.
            expected = max((s * batch / b for b, s in seconds.items()), default=0.0)
            if seconds and expected * (2 if number == 0 else 1) > left:
                return
            for counts in (False, True) if number == 0 else (True,):
                spent = _step(pipeline, text, size, batch, clock)
                left -= spent
                if counts:
                    seconds[batch] = min(spent, seconds.get(batch, spent))
                if seconds:
                    yield Gains(size, dict(seconds))


def _batches(most: int) -> Iterator[int]:
    batch = 1
    while batch < most:
        yield batch
        batch *= 2
    yield most


def _step(
    pipeline: Pipeline, text: Text, size: tuple[int, int], count: int, clock: Callable[[], float]
) -> float:
    model = pipeline.model
    shape = flow.latent_shape(*size, model.latent_channels, model.scale)
    batch: Batch[int] = Batch(pipeline.engines["transformer"], model, pipeline.schedule, *shape[1:])
    for item in range(count):
        # More than one step, so that what is timed is not a last one.
        batch.join(item, np.zeros(shape, np.float32), text, 2, pipeline.defaults.guidance)
    begin = clock()
    batch.step()
    # A clock of a fake engine may stand still, and a rate has to be finite.
    return max(clock() - begin, 1e-9)
