"""Images under way: any sizes, arrivals and drops give the pictures of the pipeline; previews."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from dermaflux import preview
from dermaflux.bundle import Limits
from dermaflux.engines import OPENVINO, ORT
from dermaflux.engines.fake import Fake
from dermaflux.errors import EngineError
from dermaflux.pipeline import Pipeline, Request
from dermaflux.residency import InTurns
from dermaflux.texts import Texts
from dermaflux.underway import Underway

WORDS = ("benign lesion", "malignant lesion", "nevus , black")


def mixed(count: int) -> list[Request]:
    sizes = ((64, 64), (32, 64), (96, 32))
    return [
        Request(WORDS[i % 3], i, 1 + i * 7 % 6, float(i % 4), *sizes[i // 2 % 3])
        for i in range(count)
    ]


def draw_all(images: Underway[int], arrivals: list[tuple[int, Request]], seed: int = 0):
    """Everything in random order of arrivals, at most 4 at once: pixels by key."""
    random, found = np.random.default_rng(seed), {}
    while arrivals or images.keys:
        joining = {}
        while arrivals and len(images.keys) + len(joining) < 4 and random.random() < 0.6:
            key, wanted = arrivals[0]
            if images.room((wanted.height, wanted.width)) <= len(joining):
                break
            joining[key] = wanted
            arrivals.pop(0)
        images.join(joining)
        for size in images.sizes:
            images.step(size)
        if random.random() < 0.5:
            found |= images.develop(images.finished())
    return found | images.develop(images.finished())


@pytest.mark.parametrize("engine", ["fake", ORT, OPENVINO])
def test_images_are_those_that_their_requests_give_alone(engine, fake_pipeline, tiny_bundle):
    pipeline = fake_pipeline
    if engine != "fake":
        pipeline = Pipeline.open(tiny_bundle, engine=engine, threads=1)
    wanted = mixed(20)
    found = draw_all(Underway(pipeline), list(enumerate(wanted)))
    assert sorted(found) == list(range(20))
    for key, request in enumerate(wanted):
        assert np.array_equal(found[key], pipeline.generate([request])[0])


def test_those_that_are_done_at_once_leave_at_once(fake_pipeline):
    wanted = [Request("benign", seed, 2, 1.0, 64, 64) for seed in range(3)]
    images: Underway[int] = Underway(fake_pipeline)
    images.join(dict(enumerate(wanted)))
    assert images.step((64, 64)) == dict.fromkeys(range(3), 1)
    assert images.step((64, 64)) == dict.fromkeys(range(3), 2)
    assert (images.keys, images.sizes) == ((), ())
    found = images.develop(images.finished())
    assert all(
        np.array_equal(found[i], fake_pipeline.generate([r])[0]) for i, r in enumerate(wanted)
    )


def test_who_is_dropped_is_gone_and_the_others_are_not(fake_pipeline):
    images: Underway[str] = Underway(fake_pipeline)
    first, second, third = mixed(3)
    images.join({"a": first, "b": second})
    images.drop(["a", "unknown"])
    images.join({"c": third})
    while images.keys:
        for size in images.sizes:
            images.step(size)
    assert images.finished().keys() == {"b", "c"}
    images.drop(["c"])
    assert images.develop(images.finished()).keys() == {"b"}
    assert images.finished() == {}


def test_an_encoder_that_fails_lets_nobody_join(fake_pipeline):
    def broken(_):
        raise EngineError("broken")

    pipeline = with_engines(fake_pipeline, text_encoder=Fake(broken))
    images: Underway[int] = Underway(pipeline)
    with pytest.raises(EngineError):
        images.join({0: mixed(1)[0]})
    assert (images.keys, images.sizes) == ((), ())


def with_engines(pipeline: Pipeline, **engines: object) -> Pipeline:
    return Pipeline(
        pipeline.model,
        pipeline.schedule,
        pipeline.limits,
        pipeline.defaults,
        pipeline.tokenizers,
        {**pipeline.engines, **engines},
    )


class TestTurns:
    """Engines that take turns in memory."""

    @pytest.fixture
    def loads(self) -> list[str]:
        return []

    @pytest.fixture
    def pipeline(self, fake_pipeline: Pipeline, loads: list[str]) -> Pipeline:
        self.alive: weakref.WeakValueDictionary[str, Fake] = weakref.WeakValueDictionary()

        def load(part: str) -> Fake:
            loads.append(part)
            engine = Fake(fake_pipeline.engines[part].function)
            self.alive[part] = engine
            return engine

        turns = InTurns(load, [("text_encoder", "text_encoder_2"), ("transformer",),
                               ("vae_decoder",)])  # fmt: skip
        pipeline = with_engines(fake_pipeline)
        pipeline.engines = turns
        return pipeline

    def test_a_whole_batch_holds_the_turn_and_loads_once(self, pipeline, loads, fake_pipeline):
        images: Underway[int] = Underway(pipeline)
        wanted = mixed(4)
        images.join(dict(enumerate(wanted)))
        assert images.room((64, 64)) == 0
        while images.keys:
            for size in images.sizes:
                images.step(size)
                assert images.previews(images.keys) == {}
            if images.keys:
                assert images.finished() == {}
        assert images.room((64, 64)) == 0
        found = images.develop(images.finished())
        assert loads == ["text_encoder", "text_encoder_2", "transformer", "vae_decoder"]
        assert list(self.alive) == ["vae_decoder"]
        for key, request in enumerate(wanted):
            assert np.array_equal(found[key], fake_pipeline.generate([request])[0])
        assert images.room((64, 64)) > 0

    @pytest.mark.parametrize("by", ["drop", "develop"])
    def test_the_turn_is_given_back(self, pipeline, by):
        from concurrent.futures import ThreadPoolExecutor

        images: Underway[int] = Underway(pipeline)
        images.join({0: mixed(1)[0]})
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(pipeline.engines.turn.acquire, False).result()
            if by == "drop":
                images.drop([0])
            else:
                while images.keys:
                    images.step(images.sizes[0])
                images.develop(images.finished())
            assert pool.submit(pipeline.engines.turn.acquire, False).result()


class TestPreviews:
    def test_a_preview_is_small_and_nearer_at_every_step(self, fake_pipeline):
        wanted = Request("benign lesion", 3, 8, 2.0, 128, 64)
        (whole,) = fake_pipeline.generate([wanted])
        averaged = whole.reshape(64, 2, 32, 2, 3).mean(axis=(1, 3))
        images: Underway[int] = Underway(fake_pipeline)
        images.join({0: wanted})
        assert images.previews([0]) == {}
        away = []
        for _ in range(7):
            images.step((128, 64))
            small = images.previews([0, 1])[0]
            assert (small.shape, small.dtype) == ((64, 32, 3), np.uint8)
            away.append(np.abs(averaged - small).mean())
        assert away == sorted(away, reverse=True)

    def test_a_decoder_of_whole_sizes_is_asked_for_small_ones_once(self, fake_pipeline):
        asked = []

        def whole_only(inputs):
            asked.append(inputs["latent_sample"].shape[2:])
            if asked[-1] != (16, 8):
                raise EngineError("compiled for one size")
            return fake_pipeline.engines["vae_decoder"].run(inputs)

        images: Underway[int] = Underway(with_engines(fake_pipeline, vae_decoder=Fake(whole_only)))
        images.join({0: Request("benign", 1, 4, 1.0, 128, 64)})
        for _ in range(2):
            images.step((128, 64))
            assert images.previews([0])[0].shape == (128, 64, 3)
        assert asked == [(8, 4), (16, 8), (16, 8)]

    def test_a_decoder_that_fails_costs_nobody_an_image(self, fake_pipeline):
        def broken(_):
            raise EngineError("broken")

        images: Underway[int] = Underway(with_engines(fake_pipeline, vae_decoder=Fake(broken)))
        images.join({0: Request("benign", 1, 4, 1.0, 64, 64)})
        images.step((64, 64))
        assert images.previews([0]) == {}
        assert images.keys == (0,)

    @pytest.mark.parametrize(
        ("limits", "size", "by"),
        [
            ((64, 256, 16), (128, 128), 2),
            ((64, 256, 16), (256, 256), 4),
            ((64, 256, 16), (256, 128), 2),
            ((64, 256, 16), (64, 64), 1),
            ((64, 256, 16), (144, 144), 1),
            ((64, 1024, 16), (1024, 1024), 8),
            ((256, 1024, 16), (1024, 1024), 4),
            ((1024, 1024, 16), (1024, 1024), 1),
        ],
    )
    def test_sides_are_those_that_the_bundle_takes(self, limits, size, by):
        assert preview.factor(Limits(*limits, max_steps=20, max_batch=4), *size) == by

    @pytest.mark.parametrize("steps", range(1, 21))
    @pytest.mark.parametrize("previews", range(9))
    def test_moments_are_spread_and_never_the_last(self, steps, previews):
        due = sorted(preview.moments(steps, previews))
        assert len(due) == min(previews, steps - 1)
        assert all(0 < step < steps for step in due)
        gaps = np.diff([0, *due, steps])
        assert gaps.max() - gaps.min() <= 1


class TestTexts:
    def test_a_text_is_encoded_once(self, fake_pipeline):
        calls = []

        def counted(inputs):
            calls.append(len(inputs["input_ids"]))
            return fake_pipeline.engines["text_encoder_2"].run(inputs)

        pipeline = with_engines(fake_pipeline, text_encoder_2=Fake(counted))
        texts = Texts(pipeline)
        # "lesion" alone differs in words, not in token ids, from a text with another space.
        first = texts.of(["benign lesion", "malignant lesion", "benign  lesion"])
        again = texts.of(["malignant lesion", "benign lesion"])
        assert calls == [2]
        assert first[0] is first[2] is again[1]
        expected = fake_pipeline.encode(["malignant lesion"])
        assert np.array_equal(again[0].embeddings, expected.embeddings)
        assert np.array_equal(again[0].pooled, expected.pooled)

    def test_what_is_kept_is_bounded_and_the_oldest_goes(self, fake_pipeline):
        one = fake_pipeline.encode(["benign"])
        size = one.embeddings.nbytes + one.pooled.nbytes
        texts = Texts(fake_pipeline, kept_bytes=2 * size)
        words = ["benign", "malignant", "lesion", "nevus", "melanoma"]
        assert len(texts.of(words)) == 5
        assert len(texts) == 2
        (kept,) = texts.of(["melanoma"])
        texts.of(["benign"])
        assert texts.of(["melanoma"])[0] is kept
        assert len(Texts(fake_pipeline, kept_bytes=0).of(words)) == 5
