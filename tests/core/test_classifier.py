"""The classifier: timm's pre-processing without torch, and decisions at their borders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dermaflux.classifier import Classifier, predict, preprocess
from dermaflux.engines import ORT
from dermaflux.engines.fake import Fake
from dermaflux.errors import BundleError, EngineError

SIZES = [(200, 100), (100, 201), (32, 32), (33, 640), (640, 479), (17, 16), (1024, 767)]


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_pixels_become_shares_less_the_mean_over_the_deviation_to_the_bit(tiny_bundle):
    spec = replace(tiny_bundle.classifier, crop_pct=1.0)
    _, height, width = spec.input_size
    image = picture(width, height)
    shares = np.asarray(image, np.float32) / np.float32(255)
    expected = (shares - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    found = preprocess(image, spec)
    assert np.array_equal(found, expected.transpose(2, 0, 1))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("interpolation", "crop", "target"),
    [
        ("bicubic", 0.9, (32, 32)),
        ("bilinear", 1.0, (64, 64)),
        ("bicubic", 0.875, (224, 224)),
        ("bilinear", 0.95, (48, 64)),
    ],
)
def test_pre_processing_is_that_of_timm(tiny_bundle, size, interpolation, crop, target):
    factory = pytest.importorskip("timm.data.transforms_factory")
    spec = replace(
        tiny_bundle.classifier,
        interpolation=interpolation,
        crop_pct=crop,
        input_size=(3, *target),
    )
    transform = factory.transforms_imagenet_eval(
        img_size=target if target[0] != target[1] else target[0],
        crop_pct=crop,
        interpolation=interpolation,
        mean=spec.mean,
        std=spec.std,
    )
    ours, theirs = preprocess(picture(*size), spec), transform(picture(*size)).numpy()
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape == (3, *target)
    assert np.abs(ours - theirs).max() < 1e-6


def test_batch_of_n_equals_n_singles(tiny_bundle):
    classifier = Classifier.open(tiny_bundle, ORT)
    pictures = [picture(*size) for size in SIZES * 2]
    together = classifier.classify(pictures)
    assert len(together) == 14
    for one, alone in zip(together, pictures, strict=True):
        assert classifier.classify([alone]) == [one]
    assert classifier.classify([]) == []


def test_a_prediction_reads_logits_as_the_bundle_says(tiny_bundle):
    spec = tiny_bundle.classifier
    found = predict(np.array([0.0, 1.5], dtype=np.float32), spec)
    assert found.probability == pytest.approx(1 / (1 + np.exp(-1)))
    assert (found.label, found.decision, found.threshold) == ("malignant", "malignant", 0.4)
    assert found.logits == (0.0, 1.5)
    assert predict(np.array([900.0, -900.0], np.float32), spec).probability == 0.0
    swapped = replace(spec, classes=("malignant", "benign"))
    assert predict(np.array([0.0, 1.5]), swapped).probability == pytest.approx(
        1 - found.probability
    )


def at(probability: float) -> np.ndarray:
    return np.array([0.0, np.log(probability / (1 - probability))])


@pytest.mark.parametrize(
    ("probability", "label", "decision"),
    [
        (0.25, "benign", "benign"),
        (0.31, "benign", "abstain"),
        (0.45, "malignant", "abstain"),
        (0.5, "malignant", "malignant"),
        (0.9, "malignant", "malignant"),
    ],
)
def test_decisions(tiny_bundle, probability, label, decision):
    spec = replace(tiny_bundle.classifier, temperature=1.0)
    found = predict(at(probability), spec)
    assert (found.label, found.decision) == (label, decision)


def test_an_empty_band_never_abstains(tiny_bundle):
    spec = replace(tiny_bundle.classifier, abstain=(0.5, 0.5), threshold=0.5, temperature=1.0)
    found = predict(np.zeros(2), spec)
    assert (found.probability, found.decision) == (0.5, "malignant")


def test_a_bundle_without_a_classifier_says_so(tiny_bundle):
    with pytest.raises(BundleError, match="has no classifier"):
        Classifier.open(replace(tiny_bundle, classifier=None))


def test_logits_that_are_not_finite_are_no_prediction(tiny_bundle):
    engine = Fake(lambda inputs: {"logits": np.full((1, 2), np.nan, np.float32)})
    with pytest.raises(EngineError, match="not finite"):
        Classifier(tiny_bundle.classifier, engine).classify([picture(32, 32)])
