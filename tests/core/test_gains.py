"""What batches gain, by a clock that a fake engine moves."""

from __future__ import annotations

import pytest

from dermaflux.engines.fake import Fake
from dermaflux.gains import Gains, measure
from dermaflux.pipeline import Pipeline
from dermaflux.residency import InTurns


class Clock:
    """A machine on which a step of a batch takes as long as `seconds` says."""

    def __init__(self, pipeline: Pipeline, seconds: dict[int, float]) -> None:
        self.now = 0.0
        self.batches: list[int] = []
        velocity = pipeline.engines["transformer"]

        def step(inputs):
            self.batches.append(len(inputs["timestep"]))
            self.now += seconds[self.batches[-1]]
            return velocity.run(inputs)

        engines = {**pipeline.engines, "transformer": Fake(step)}
        self.pipeline = Pipeline(pipeline.model, pipeline.schedule, pipeline.limits,
                                 pipeline.defaults, pipeline.tokenizers, engines)  # fmt: skip

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 1.0, 2: 1.95, 4: 3.9}, 1),
        ({1: 1.0, 2: 1.5, 4: 2.9}, 2),
        ({1: 1.0, 2: 1.2, 4: 1.5}, 4),
        ({1: 1.0, 2: 2.5, 4: 3.0}, 4),
    ],
)
def test_the_limit_is_the_smallest_batch_near_the_best(fake_pipeline, seconds, limit):
    clock = Clock(fake_pipeline, seconds)
    found = measure(clock.pipeline, clock=clock, budget_seconds=60)
    assert found.seconds == pytest.approx(seconds)
    assert found.limit() == limit
    # Each once before it counts, then round by round.
    assert clock.batches == [1, 1, 2, 2, 4, 4, 1, 2, 4, 1, 2, 4]


def test_a_disturbed_round_does_not_count(fake_pipeline):
    clock = Clock(fake_pipeline, {1: 1.0, 2: 1.5, 4: 2.0})
    plain = clock.pipeline.engines["transformer"].function

    def disturbed(inputs):
        clock.now += 5.0 * (len(clock.batches) in (3, 7))
        return plain(inputs)

    clock.pipeline.engines = {**clock.pipeline.engines, "transformer": Fake(disturbed)}
    assert measure(clock.pipeline, clock=clock, budget_seconds=60).seconds[2] == 1.5


def test_what_would_take_too_long_is_not_measured(fake_pipeline):
    clock = Clock(fake_pipeline, {1: 2.0, 2: 4.0, 4: 8.0})
    found = measure(clock.pipeline, clock=clock, budget_seconds=13)
    assert list(found.seconds) == [1, 2]
    assert clock.now <= 13
    slow = Clock(fake_pipeline, {1: 60.0})
    assert measure(slow.pipeline, clock=slow).limit() == 1


def test_engines_that_take_turns_draw_as_many_as_fit(fake_pipeline):
    clock = Clock(fake_pipeline, {})
    engines = clock.pipeline.engines
    clock.pipeline.engines = InTurns(engines.__getitem__, [(part,) for part in engines])
    assert measure(clock.pipeline, clock=clock).limit() == fake_pipeline.limits.max_batch
    assert clock.batches == []


def test_rates_are_items_a_second():
    gains = Gains((64, 64), {1: 0.5, 4: 1.0})
    assert gains.rates == {1: 2.0, 4: 4.0}
    assert gains.limit(near=0.6) == 1
