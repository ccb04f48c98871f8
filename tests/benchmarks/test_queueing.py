from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.queue_theory import Cost, costs, long_run, simulated
from benchmarks.queueing import (
    Arrival,
    Clock,
    CpuClock,
    Side,
    arrivals,
    expected,
    main,
    measure,
    report,
    serve,
    side,
)
from dermaflux.bundle import Bundle
from dermaflux.engines.fake import Fake
from dermaflux.gains import Gains
from dermaflux.pipeline import Pipeline, Request


class Moved(Clock):
    """Time that only steps and sleeping move: a step takes `seconds` of its batch."""

    def __init__(self, pipeline: Pipeline, seconds: dict[int, float]) -> None:
        self.time = 0.0
        velocity = pipeline.engines["transformer"]

        def step(inputs):
            self.time += seconds[len(inputs["timestep"])]
            return velocity.run(inputs)

        self.pipeline = Pipeline(pipeline.model, pipeline.schedule, pipeline.limits,
                                 pipeline.defaults, pipeline.tokenizers,
                                 {**pipeline.engines, "transformer": Fake(step)})  # fmt: skip

    def now(self) -> float:
        return self.time

    def sleep_until(self, then: float) -> None:
        assert then > self.time
        self.time = then


def at(*dues: float, steps: int = 2) -> list[Arrival]:
    return [Arrival(due, Request("benign", i, steps, 1.0, 64, 64)) for i, due in enumerate(dues)]


def test_first_come_waits_for_those_before_and_a_batch_is_joined(fake_pipeline):
    clock = Moved(fake_pipeline, {1: 1.0, 2: 1.5})
    wanted = at(0, 0.5, 10)
    assert serve(clock.pipeline, wanted, 1.0, 1, clock) == pytest.approx([2, 3.5, 2])
    # The second joins after a step of one; then a step of two, and one of one.
    clock.time = 0.0
    assert serve(clock.pipeline, wanted, 1.0, 2, clock) == pytest.approx([2.5, 3.0, 2])
    # Twice the rate: due at 0.25 and 5.
    clock.time = 0.0
    assert serve(clock.pipeline, wanted, 2.0, 1, clock) == pytest.approx([2, 3.75, 2])


def test_a_side_counts_from_when_requests_were_due():
    found = side(at(1, 2, 3), 0.5, [1.0, 2.0, 6.0])
    assert found == Side(mean=3.0, p95=pytest.approx(5.6), images_per_second=3 / 10)


def test_arrivals_are_the_same_for_a_seed_and_one_a_second(fake_pipeline):
    wanted = arrivals(fake_pipeline, 500, (2, 6), 3)
    assert wanted == arrivals(fake_pipeline, 500, (2, 6), 3)
    assert wanted != arrivals(fake_pipeline, 500, (2, 6), 4)
    assert {one.request.steps for one in wanted} == set(range(2, 7))
    assert wanted[-1].due / 500 == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_prediction_is_what_a_long_queue_does(fake_pipeline, share):
    clock = Moved(fake_pipeline, {1: 1.0, 2: 1.6, 3: 2.2, 4: 2.8})
    cost = costs(clock.pipeline, (1, 5), clock.now)
    assert cost.rest == 0
    wanted = arrivals(clock.pipeline, 800, (1, 5), 1)
    (both,) = measure(clock.pipeline, wanted, [share], 4, 1, clock)
    assert both[4].mean / both[1].mean == pytest.approx(long_run(share, cost, 4), rel=0.2)
    foretold = expected(share, wanted, 4, cost)["predicted_mean_ratio"]
    assert both[4].mean / both[1].mean == pytest.approx(foretold, rel=0.02)


def test_a_simulation_goes_through_arrivals():
    cost = Cost((2, 2), Gains((64, 64), {1: 1.0, 2: 1.5}), 0.25)
    assert simulated([0, 0.5, 10], [2, 2, 2], 1, cost) == pytest.approx([2.25, 4.0, 2.25])
    assert simulated([0, 0.5, 10], [2, 2, 2], 2, cost) == pytest.approx([2.75, 3.5, 2.25])


def flat_and_steep(rest: float) -> tuple[Cost, Cost]:
    flat, steep = ({1: 1.0, 2: 2.0, 4: 4.0}, {1: 1.0, 2: 1.2, 4: 2.0})
    return Cost((4, 20), Gains((64, 64), flat), rest), Cost((4, 20), Gains((64, 64), steep), rest)


def test_without_gains_sharing_is_no_better_than_order():
    flat, steep = flat_and_steep(0.0)
    assert long_run(0.8, flat, 4) > 1
    assert long_run(0.8, steep, 4) < 0.7
    assert long_run(1.0, flat, 4) is None
    # What batches do not share takes from what they gain.
    assert long_run(0.8, steep, 4) < long_run(0.8, flat_and_steep(12.0)[1], 4)


def test_processor_time_skips_pauses():
    clock = CpuClock()
    begin = time.monotonic()
    then = clock.now() + 1000
    clock.sleep_until(then)
    assert then <= clock.now() < then + 10
    assert time.monotonic() - begin < 10


def test_ratios_are_within_rounds():
    sides = [
        {1: Side(2, 4, 1), 4: Side(1, 3, 1)},
        {1: Side(20, 40, 0.1), 4: Side(5, 30, 0.1)},
        {1: Side(2, 4, 1), 4: Side(3, 3, 1.1)},
    ]
    (row,) = report([0.8], 4, sides, {0.8: {"predicted_mean_ratio": 0.5}})
    assert (row["median_mean_ratio"], row["median_p95_ratio"]) == (0.5, 0.75)
    assert row["first_come"]["mean"] == 2
    assert row["predicted_mean_ratio"] == 0.5


def test_the_command_serves_both_sides(tiny_bundle: Bundle, tmp_path: Path, capsys):
    out = tmp_path / "result.json"
    status = main(["--bundle", str(tiny_bundle.path), "--requests=4", "--rounds=1", "--steps",
                   "1", "3", "--shares", "0.8", "--threads=1", f"--out={out}"])  # fmt: skip
    assert status == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    (row,) = result["shares"]
    assert row["first_come"]["mean"] > 0
    assert len(row["rounds"]) == 1


@pytest.mark.parametrize(
    "options", [["--requests=0"], ["--shares", "0"], ["--steps", "5", "4"], ["--limit=0"]]
)
def test_what_makes_no_sense_is_refused(options: list[str], capsys):
    assert main(options) == 2
    assert options[0].split("=")[0] in capsys.readouterr().err
