"""Steps that are forecast: near the full run, fewer passes, and each item as it is alone."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.denoise import Batch
from dermaflux.engines import OPENVINO, ORT, Array, Arrays
from dermaflux.engines.fake import Fake
from dermaflux.errors import EngineError
from dermaflux.flow import Schedule
from dermaflux.forecast import FIRST, IN_A_ROW, Forecast
from dermaflux.pipeline import Pipeline, Request
from dermaflux.underway import Underway

SIZE = 64
SIGMAS = Schedule(shift=3.0).sigmas(20, 32)


def curve(power: int, sigma: float) -> Array:
    """A velocity that is a polynomial in sigma, other in each number."""
    base = np.random.default_rng(5).standard_normal((32, 64)).astype(np.float32)
    return base * np.float32(1 + 0.8 * sigma**power)


def followed(power: int) -> tuple[Array, Array, int]:
    """Tokens after 20 steps along a curve: all computed, and as far as `Forecast` asks for it."""
    forecast, whole, fast = Forecast(SIGMAS), np.zeros((32, 64), np.float32), None
    fast = whole
    for step, (sigma, after) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
        velocity = curve(power, float(sigma))
        whole = whole + (after - sigma) * velocity
        guess = forecast.at(step)
        if guess is None:
            correction = forecast.computed(step, velocity)
            fast = fast if correction is None else fast + correction
            fast = fast + (after - sigma) * velocity
        else:
            forecast.taken(step, guess)
            fast = fast + (after - sigma) * guess
    return whole, fast, forecast.calls


@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_curve_up_to_a_parabola_is_put_right_to_rounding(power: int) -> None:
    whole, fast, calls = followed(power)
    assert calls <= 10
    assert np.abs(whole - fast).max() < 1e-5


def test_first_and_last_steps_are_computed_and_no_row_is_too_long() -> None:
    forecast = Forecast(SIGMAS)
    made = []
    for step in range(20):
        guess = forecast.at(step)
        made.append(guess is None)
        if guess is None:
            forecast.computed(step, np.ones((4, 4), np.float32))
        else:
            forecast.taken(step, guess)
    assert made == [*[True] * FIRST, *[False] * IN_A_ROW, True, *[False] * 7, True]
    short = Forecast(SIGMAS[-5:])
    for step in range(4):
        assert short.at(step) is None
        short.computed(step, np.ones((4, 4), np.float32))


def test_a_velocity_that_jumps_is_computed_at_every_step() -> None:
    forecast, random = Forecast(SIGMAS), np.random.default_rng(0)
    for step in range(20):
        assert forecast.at(step) is None
        assert forecast.computed(step, random.standard_normal((8, 8)).astype(np.float32)) is None


def counted(pipeline: Pipeline, rows: list[int], broken: list[bool] | None = None) -> Fake:
    """The pipeline's transformer, counting the rows of each call."""
    engine = pipeline.engines["transformer"]

    def run(inputs: Arrays) -> dict[str, Array]:
        if broken:
            raise EngineError("broken")
        rows.append(len(inputs["hidden_states"]))
        return engine.run(inputs)

    return Fake(run)


def joined(pipeline: Pipeline, engine: Fake, wanted: dict[int, Request]) -> Batch[int]:
    h, w = flow.latent_shape(SIZE, SIZE, 1, pipeline.model.scale)[1:]
    going: Batch[int] = Batch(engine, pipeline.model, pipeline.schedule, h, w, forecasts=True)
    for key, request in wanted.items():
        text = pipeline.encode([request.prompt])
        going.join(key, pipeline.start(request), text, request.steps, request.guidance)
    return going


def requests(count: int) -> dict[int, Request]:
    words = ("benign lesion", "malignant lesion , black")
    return {
        i: Request(words[i % 2], i, (18, 20, 12)[i % 3], i % 3, SIZE, SIZE) for i in range(count)
    }


@pytest.fixture(params=["fake", ORT, OPENVINO])
def cached(request: pytest.FixtureRequest, fake_pipeline: Pipeline, tiny_bundle: Bundle):
    if request.param == "fake":
        return fake_pipeline
    return Pipeline.open(tiny_bundle, engine=request.param, threads=1, tier="cached")


def test_an_item_is_the_one_that_it_is_alone_whoever_forecasts_beside_it(cached: Pipeline) -> None:
    wanted = requests(4)
    rows: list[int] = []
    together = joined(cached, counted(cached, rows), wanted)
    found, steps = {}, 0
    while len(together):
        found |= together.step()
        steps += 1
    assert steps == 20, "steps that are forecast are steps"
    assert sum(rows) < sum(request.steps for request in wanted.values())
    for key, request in wanted.items():
        alone = joined(cached, counted(cached, []), {key: request})
        for _ in range(request.steps):
            last = alone.step()
        assert np.array_equal(last[key], found[key])


def test_the_full_run_is_near(fake_pipeline: Pipeline) -> None:
    request = requests(1)[0]
    rows: list[int] = []
    batch = joined(fake_pipeline, counted(fake_pipeline, rows), {0: request})
    for _ in range(request.steps):
        last = batch.step()
    (whole,) = fake_pipeline.latents([request])
    assert len(rows) <= request.steps * 2 // 3
    few = Request(request.prompt, 0, len(rows), request.guidance, SIZE, SIZE)
    (control,) = fake_pipeline.latents([few])
    assert np.abs(last[0] - whole).mean() < np.abs(control - whole).mean() / 3


def test_an_engine_that_fails_leaves_everybody_where_they_were(fake_pipeline: Pipeline) -> None:
    wanted, broken = requests(3), []
    engine = counted(fake_pipeline, [], broken)
    smooth, stumbling = (joined(fake_pipeline, engine, wanted) for _ in range(2))
    expected, found = {}, {}
    while len(smooth):
        expected |= smooth.step()
    while len(stumbling):
        broken.append(True)
        with suppress(EngineError):
            found |= stumbling.step()
        broken.clear()
        if len(stumbling):
            found |= stumbling.step()
    assert all(np.array_equal(found[key], expected[key]) for key in wanted)


def test_a_tier_that_forecasts_stands_in_the_record_and_others_do_not(tiny_bundle: Bundle) -> None:
    opened = {
        name: Pipeline.open(tiny_bundle, engine=ORT, threads=1, tier=name)
        for name in (None, "lossless", "cached")
    }
    request = opened[None].request("benign lesion", seed=1, steps=12)
    records = {name: pipeline.record(request) for name, pipeline in opened.items()}
    assert records["cached"].pop("tier") == "cached"
    assert records["cached"] == records["lossless"] == records[None]
    whole, exact, near = (pipeline.latents([request])[0] for pipeline in opened.values())
    assert np.array_equal(whole, exact)
    assert not np.array_equal(whole, near)


def test_images_under_way_are_those_of_generate(tiny_bundle: Bundle) -> None:
    pipeline = Pipeline.open(tiny_bundle, engine=ORT, threads=1, tier="cached")
    wanted = [pipeline.request("benign lesion", seed=i, steps=10 + i) for i in range(2)]
    images: Underway[int] = Underway(pipeline)
    images.join({0: wanted[0]})
    images.step(images.sizes[0])
    images.join({1: wanted[1]})
    moved: list[int] = []
    while images.keys:
        moved.append(images.step(images.sizes[0]).get(1, 0))
    assert moved == list(range(1, 12))
    finished = images.finished()
    for key, latents in enumerate(pipeline.latents(wanted)):
        assert np.array_equal(finished[key], latents)
