"""A batch that items join and leave: each gives what it gives alone, to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.denoise import Batch
from dermaflux.engines import OPENVINO, ORT, Array, Arrays
from dermaflux.engines.fake import Fake
from dermaflux.errors import EngineError
from dermaflux.pipeline import Pipeline, Request

SIZE = 64


def requests(count: int) -> list[Request]:
    return [
        Request(("benign lesion", "malignant lesion , black")[i % 2], i, 1 + i % 5, i % 3, SIZE, 32)
        for i in range(count)
    ]


def batch(pipeline: Pipeline) -> Batch[int]:
    h, w = flow.latent_shape(SIZE, 32, 1, pipeline.model.scale)[1:]
    return Batch(pipeline.engines["transformer"], pipeline.model, pipeline.schedule, h, w)


def join(batch: Batch[int], pipeline: Pipeline, key: int, wanted: Request) -> None:
    text = pipeline.encode([wanted.prompt])
    batch.join(key, pipeline.start(wanted), text, wanted.steps, wanted.guidance)


@pytest.fixture(params=["fake", ORT, OPENVINO])
def pipeline(request: pytest.FixtureRequest, fake_pipeline: Pipeline, tiny_bundle: Bundle):
    if request.param == "fake":
        return fake_pipeline
    return Pipeline.open(tiny_bundle, engine=request.param, threads=1)


def test_who_joins_late_gets_the_latents_that_it_gives_alone(pipeline: Pipeline) -> None:
    wanted = requests(12)
    alone = pipeline.latents(wanted[:1])
    for one in wanted[1:]:
        alone += pipeline.latents([one])
    random = np.random.default_rng(0)
    for _ in range(3):
        arrivals = random.permutation(len(wanted)).tolist()
        going, found = batch(pipeline), {}
        while arrivals or len(going):
            for _ in range(random.integers(0, 3)):
                if arrivals and len(going) < 4:
                    key = arrivals.pop()
                    join(going, pipeline, key, wanted[key])
            if len(going):
                found |= going.step()
        assert sorted(found) == list(range(len(wanted)))
        assert all(np.array_equal(found[i], latents) for i, latents in enumerate(alone))


def test_who_is_dropped_changes_nothing_for_the_others(pipeline: Pipeline) -> None:
    first, second = (Request("benign lesion", seed, 4, 2.0, SIZE, 32) for seed in (1, 2))
    going = batch(pipeline)
    join(going, pipeline, 1, first)
    join(going, pipeline, 2, second)
    going.step()
    going.drop(1)
    going.drop(1)
    assert going.keys == (2,)
    assert [going.step(), going.step()] == [{}, {}]
    assert np.array_equal(going.step()[2], pipeline.latents([second])[0])
    assert len(going) == 0


def test_the_predicted_end_is_the_end_at_the_last_step(fake_pipeline: Pipeline) -> None:
    going = batch(fake_pipeline)
    join(going, fake_pipeline, 0, Request("benign lesion", 1, 3, 2.0, SIZE, 32))
    assert going.clean(0) is None
    (final,) = fake_pipeline.latents([Request("benign lesion", 1, 3, 2.0, SIZE, 32)])
    away = []
    for _ in range(2):
        going.step()
        clean = going.clean(0)
        assert clean is not None
        away.append(float(np.abs(clean - final).mean()))
    assert away[1] < away[0]


def test_along_a_straight_line_the_first_step_knows_the_end(fake_pipeline: Pipeline) -> None:
    """A rectified flow that is straight: velocity = noise - image, wherever it is asked."""
    image = np.random.default_rng(1).standard_normal((1, 16, 8, 4)).astype(np.float32)
    start = flow.noise(3, (16, 8, 4))[None]
    velocity = flow.pack(start) - flow.pack(image)
    straight = Fake(lambda _: {"out_hidden_states": velocity})
    going: Batch[str] = Batch(straight, fake_pipeline.model, fake_pipeline.schedule, 8, 4)
    going.join("a", start[0], fake_pipeline.encode(["benign"]), 5, 1.0)
    going.step()
    assert np.allclose(going.clean("a"), image[0], atol=1e-5)


@dataclass
class Counted:
    """An engine that counts how often it is told what stays the same."""

    inner: Fake
    binds: list[int] = field(default_factory=list)
    fails: bool = False
    name: str = "counted"
    precision: str = "fp32"

    def run(self, inputs: Arrays) -> dict[str, Array]:
        return self.inner.run(inputs)

    def bind(self, constant: Arrays, timesteps: Array | None = None):
        self.binds.append(len(constant["pooled_projections"]))
        bound = self.inner.bind(constant, timesteps)

        def step(varying: Arrays) -> dict[str, Array]:
            if self.fails:
                raise EngineError("broken")
            return bound(varying)

        return step


def test_the_engine_is_bound_anew_only_when_somebody_came_or_went(fake_pipeline) -> None:
    engine = Counted(fake_pipeline.engines["transformer"])
    going: Batch[int] = Batch(engine, fake_pipeline.model, fake_pipeline.schedule, 8, 4)
    join(going, fake_pipeline, 0, Request("benign", 1, 4, 1.0, SIZE, 32))
    going.step(), going.step()
    join(going, fake_pipeline, 1, Request("benign", 2, 4, 1.0, SIZE, 32))
    join(going, fake_pipeline, 2, Request("benign", 3, 4, 1.0, SIZE, 32))
    for _ in range(4):
        going.step()
    assert engine.binds == [1, 3, 2]


def test_an_engine_that_fails_leaves_items_where_they_were(fake_pipeline) -> None:
    wanted = Request("benign", 1, 3, 1.0, SIZE, 32)
    engine = Counted(fake_pipeline.engines["transformer"])
    going: Batch[int] = Batch(engine, fake_pipeline.model, fake_pipeline.schedule, 8, 4)
    join(going, fake_pipeline, 0, wanted)
    going.step()
    engine.fails = True
    with pytest.raises(EngineError):
        going.step()
    assert going.done(0) == 1
    engine.fails = False
    going.step()
    assert np.array_equal(going.step()[0], fake_pipeline.latents([wanted])[0])


def test_the_engine_is_told_the_timesteps_that_it_will_be_asked_for(fake_pipeline) -> None:
    told: list[Array] = []
    asked: list[Array] = []

    class Told(Fake):
        def bind(self, constant: Arrays, timesteps: Array | None = None):
            told.append(timesteps)
            bound = super().bind(constant)

            def step(varying: Arrays) -> dict[str, Array]:
                asked.append(varying["timestep"])
                return bound(varying)

            return step

    engine = Told(fake_pipeline.engines["transformer"].function)
    going: Batch[int] = Batch(engine, fake_pipeline.model, fake_pipeline.schedule, 8, 4)
    join(going, fake_pipeline, 0, Request("benign", 1, 5, 1.0, SIZE, 32))
    going.step()
    join(going, fake_pipeline, 1, Request("benign", 2, 7, 1.0, SIZE, 32))
    while len(going):
        going.step()
    assert [one.shape for one in told] == [(1, 5), (2, 7), (1, 3)]
    assert np.array_equal(told[0][:, 0], asked[0])
    assert np.array_equal(told[1][:, :4], np.stack(asked[1:5], axis=1))
    assert np.all(told[1][0, 4:] == told[1][0, 3])
    assert np.array_equal(told[2], np.stack(asked[5:], axis=1))
