"""The embedded default's bundle on real engines: bit-equal batches, threads, and the CLI's path."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.engines import OPENVINO, ORT
from dermaflux.pipeline import Pipeline, Request
from dermaflux.underway import Underway
from tests.tiny import CAPTIONS

ENGINES = [(ORT, "fp32"), (OPENVINO, "fp32"), (OPENVINO, "int8")]


@pytest.fixture(scope="module")
def opened(bundle) -> Bundle:
    return Bundle.open(bundle, verify=True)


@pytest.fixture(scope="module", params=ENGINES, ids=[" ".join(pair) for pair in ENGINES])
def pipeline(request: pytest.FixtureRequest, opened: Bundle) -> Pipeline:
    engine, precision = request.param
    return Pipeline.open(opened, engine=engine, precision=precision)


def requests(pipeline: Pipeline, count: int) -> list[Request]:
    """Requests of one small size, so that they share batches; steps, seeds and words differ."""
    small = pipeline.limits.min_size
    return [
        pipeline.request(CAPTIONS[i % 2], seed=i, steps=1 + i % 3, height=small, width=2 * small)
        for i in range(count)
    ]


@pytest.mark.parametrize("count", range(1, 9))
def test_batches_of_1_to_8_and_mixed_steps_are_bit_equal(pipeline, count):
    wanted = requests(pipeline, count)
    images = pipeline.generate(wanted)
    # The last item is alone in the batches before it, so every item is compared once.
    (alone,) = pipeline.generate(wanted[-1:])
    assert np.array_equal(images[-1], alone)
    # And to the last bit before rounding to 255 levels, which hides small differences.
    text = pipeline.encode([request.prompt for request in wanted])
    single = pipeline.encode([wanted[-1].prompt])
    assert np.array_equal(text.embeddings[-1:], single.embeddings)
    assert np.array_equal(text.pooled[-1:], single.pooled)
    small = pipeline.limits.min_size
    model = pipeline.model
    shape = flow.latent_shape(small, 2 * small, model.latent_channels, model.scale)
    noise = np.stack([flow.noise(request.seed, shape) for request in wanted])
    steps = [request.steps for request in wanted]
    guidance = [request.guidance for request in wanted]
    together = pipeline.denoise(noise, text, steps=steps, guidance=guidance)
    apart = pipeline.denoise(noise[-1:], single, steps=steps[-1:], guidance=guidance[-1:])
    assert np.array_equal(together[-1:], apart)


def test_who_joins_a_running_batch_is_drawn_as_alone(pipeline):
    wanted = [replace(one, steps=2 + i % 3) for i, one in enumerate(requests(pipeline, 6))]
    wanted += [replace(wanted[0], width=wanted[0].height, seed=9)]
    alone = [pipeline.latents([request])[0] for request in wanted]
    images: Underway[int] = Underway(pipeline)
    for key, request in enumerate(wanted):
        images.join({key: request})
        for size in images.sizes:
            images.step(size)
    while images.keys:
        for size in images.sizes:
            images.step(size)
    found = images.finished()
    assert all(np.array_equal(found[key], latents) for key, latents in enumerate(alone))
    developed = images.develop(found)
    assert np.array_equal(developed[3], pipeline.develop([alone[3]])[0])


def test_several_threads_draw_what_one_draws(pipeline):
    wanted = requests(pipeline, 4)
    expected = [pipeline.generate([request])[0] for request in wanted]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: pipeline.generate([request])[0], wanted))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_asked_for_is_seen(pipeline):
    first = requests(pipeline, 1)[0]
    images = pipeline.generate(
        [first, replace(first, seed=99), replace(first, prompt=CAPTIONS[1]), first]
    )
    assert images[0].std() > 5
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert np.array_equal(images[0], images[3])


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_classified_together_as_alone(opened, engine, precision):
    classifier = Classifier.open(opened, engine, precision)
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (96, 96 + 8 * i, 3), dtype=np.uint8))
        for i in range(9)
    ]
    together = classifier.classify(pictures)
    assert together == [classifier.classify([picture])[0] for picture in pictures]
    assert all(0 <= found.probability <= 1 for found in together)
