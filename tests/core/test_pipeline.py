"""The pipeline over fakes: an image depends on its request alone; progress; cancel."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from dermaflux import flow
from dermaflux.engines.fake import Fake
from dermaflux.errors import Cancelled, EngineError, RequestError
from dermaflux.pipeline import Pipeline, Progress, Request

BASE = Request("benign lesion", seed=1, steps=4, guidance=3.5, height=64, width=64)


def mixed() -> list[Request]:
    """Requests that share nothing: sizes, steps, seeds, guidance and prompts all mixed."""
    return [
        Request(
            prompt="benign lesion" if i % 2 else "malignant lesion",
            seed=i,
            steps=1 + i % 5,
            guidance=float(i % 3),
            height=64 if i % 3 else 32,
            width=32 + 16 * (i % 2),
        )
        for i in range(13)
    ]


def test_batch_of_n_equals_n_singles(fake_pipeline):
    requests = mixed()
    images = fake_pipeline.generate(requests)
    for request, image in zip(requests, images, strict=True):
        assert image.dtype == np.uint8
        assert image.shape == (request.height, request.width, 3)
        assert np.array_equal(image, fake_pipeline.generate([request])[0])


def test_order_is_no_matter(fake_pipeline):
    requests = mixed()
    forward, backward = (fake_pipeline.generate(order) for order in (requests, requests[::-1]))
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward[::-1], strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", "malignant nevus"), ("seed", 2), ("steps", 5), ("guidance", 1.0)],
)
def test_every_field_matters(fake_pipeline, field, value):
    one, other = fake_pipeline.generate([BASE, replace(BASE, **{field: value})])
    assert not np.array_equal(one, other)


def test_nothing_asked_for_gives_nothing(fake_pipeline):
    assert fake_pipeline.generate([]) == []


def test_given_latents_replace_the_seed(fake_pipeline):
    shape = (16, 8, 8)
    (expected,) = fake_pipeline.generate([BASE])
    other = replace(BASE, seed=99)
    given = flow.noise(BASE.seed, shape)
    first, second = fake_pipeline.generate([other, BASE], latents=[given.astype(np.float64), None])
    assert np.array_equal(first, expected)
    assert np.array_equal(second, expected)
    with pytest.raises(RequestError, match="latents"):
        fake_pipeline.generate([BASE], latents=[np.zeros((16, 8, 4))])


def test_the_stages_make_the_image(fake_pipeline):
    text = fake_pipeline.encode([BASE.prompt])
    start = flow.noise(BASE.seed, (16, 8, 8))[None]
    kept = start.copy()
    final = fake_pipeline.denoise(start, text, steps=[4], guidance=[3.5])
    assert np.array_equal(start, kept)
    (image,) = fake_pipeline.decode(final)
    assert np.array_equal(image, fake_pipeline.generate([BASE])[0])


def test_progress_counts_every_step_once(fake_pipeline):
    requests = mixed()
    seen: list[Progress] = []
    fake_pipeline.generate(requests, on_step=seen.append)
    assert [progress.step for progress in seen] == list(range(1, len(seen) + 1))
    assert {progress.steps for progress in seen} == {len(seen)}
    for item, request in enumerate(requests):
        assert sum(item in progress.items for progress in seen) == request.steps
    assert max(len(progress.items) for progress in seen) <= fake_pipeline.limits.max_batch


@pytest.mark.parametrize("after", [0, 1, 3, 4])
def test_cancel_is_asked_at_every_step(fake_pipeline, after):
    steps: list[Progress] = []
    with pytest.raises(Cancelled):
        fake_pipeline.generate([BASE], on_step=steps.append, cancelled=lambda: len(steps) >= after)
    assert len(steps) == after


def test_several_threads_may_generate(fake_pipeline):
    requests = mixed()
    expected = fake_pipeline.generate(requests)
    start = threading.Barrier(4)

    def work(_: int) -> list[np.ndarray]:
        start.wait()
        return fake_pipeline.generate(requests)

    with ThreadPoolExecutor(4) as pool:
        for images in pool.map(work, range(4)):
            assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))


def test_numbers_that_are_not_finite_become_no_image(fake_pipeline):
    broken = Fake(lambda inputs: {"sample": np.full((1, 3, 64, 64), np.nan, np.float32)})
    pipeline = Pipeline(
        fake_pipeline.model,
        fake_pipeline.schedule,
        fake_pipeline.limits,
        fake_pipeline.defaults,
        fake_pipeline.tokenizers,
        {**fake_pipeline.engines, "vae_decoder": broken},
    )
    with pytest.raises(EngineError, match="not finite"):
        pipeline.generate([BASE])


def test_a_request_and_its_record(fake_pipeline):
    request = fake_pipeline.request("benign lesion", seed=7, height=32)
    assert request == Request("benign lesion", 7, 4, 3.5, 32, 64)
    record = fake_pipeline.record(request)
    assert record["prompt"] == "benign lesion"
    assert record["engine"] == "fake"
    assert all(isinstance(value, str) for value in record.values())
    again = fake_pipeline.request(
        record["prompt"],
        *(int(record["seed"]), int(record["steps"]), float(record["guidance"])),
        *(int(record["height"]), int(record["width"])),
    )
    assert again == request


def test_tokens_are_counted_before_they_are_cut(fake_pipeline):
    assert fake_pipeline.token_count("benign lesion") == 2
    assert fake_pipeline.token_count("lesion " * 40) == 40
    assert fake_pipeline.encode(["lesion " * 40]).embeddings.shape[1] == 16
