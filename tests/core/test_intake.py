"""The gate before the classifier: measures, densities, reasons, and where its limits come from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dermaflux.appearance import LENGTH, SIDE, describe, measure, square
from dermaflux.bundle import Bundle, sha256
from dermaflux.checkpoint import Checkpoint, classifier_spec
from dermaflux.classifier import Classifier
from dermaflux.density import Density
from dermaflux.engines import ORT
from dermaflux.engines.fake import Fake
from dermaflux.errors import BundleError, EngineError
from dermaflux.intake import Intake, arrays_of
from tests.lenient import lenient, limits, one_gaussian
from tests.tiny_bundle import write_bundle


def lesion(side: int = 256) -> Image.Image:
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    inside = (np.hypot(rows, columns) < 0.4)[..., None]
    pixels = np.where(inside, (110, 70, 50), (220, 180, 160)).astype(np.float64)
    pixels += np.random.default_rng(0).normal(0, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def saved(folder: Path, intake: Intake) -> Path:
    (folder / "classifier").mkdir(exist_ok=True)
    file = folder / intake.spec.file
    np.savez(
        file, **arrays_of([intake.appearance, intake.features, intake.lesions, intake.textures])
    )
    return file


def test_the_square_is_the_middle_in_any_size():
    picture = lesion(256)
    wide = Image.new("RGB", (600, 256), "blue")
    wide.paste(picture, (172, 0))
    assert square(wide).shape == (SIDE, SIDE, 3)
    assert np.array_equal(square(wide), square(picture))
    large, small = (describe(square(lesion(256).resize((n, n)))) for n in (1024, 256))
    assert np.abs(large - small).mean() < 0.5


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_descriptions_of_pictures_of_nothing_are_finite(colour):
    found = describe(square(Image.new("RGB", (200, 200), colour)))
    assert found.shape == (LENGTH,)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


def test_quality_measures_what_it_says():
    picture = lesion()
    good = measure(square(picture))
    dark = measure(square(picture.point(lambda value: value // 8)))
    over = measure(square(picture.point(lambda value: min(255, value * 3))))
    blurred = measure(square(picture.filter(ImageFilter.GaussianBlur(6))))
    random = np.random.default_rng(0)
    noise = np.asarray(picture) + random.normal(0, 40, (256, 256, 3))
    noisy = measure(square(Image.fromarray(noise.clip(0, 255).astype(np.uint8))))
    faint = measure(square(picture.point(lambda value: 150 + value // 20)))
    assert dark.light < 40 < good.light
    assert over.clipped > 0.5 > good.clipped
    assert over.shade > good.shade
    assert blurred.sharpness < good.sharpness - 0.5
    assert noisy.grain > good.grain + 0.5
    assert faint.contrast < 5 < good.contrast


def test_a_density_of_one_component_is_the_normal_one():
    density = one_gaussian(3)
    vectors = np.array([[0, 0, 9], [1, 0, 0], [1.5, -1.5, 0], [30, 0, 0]], np.float32)
    # Beyond 8 deviations all is as far out.
    expected = -np.log(2 * np.pi) - 0.5 * (vectors[:, :2].clip(-8, 8) ** 2).sum(1)
    assert density.score_all(vectors) == pytest.approx(expected)
    assert density.score(vectors[2]) == pytest.approx(expected[2])


def test_numbers_beyond_all_that_was_seen_go_on_growing():
    density = replace(one_gaussian(2), spread=np.array([0.5, 2.0], np.float32))
    found = density.normal(np.array([[2, 2], [3, 3], [-4, -4]], np.float32))
    assert found.tolist() == [[2, 2], [4, 2.5], [-6, -3]]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_each_number_is_placed_as_numpy_does_it_column_by_column(count):
    random = np.random.default_rng(count)
    width = 7
    knots = np.sort(random.integers(-20, 20, (count, width)), axis=0).astype(
        np.float32
    )  # some alike
    scores = np.sort(random.standard_normal(count)).astype(np.float32)
    spread = np.full(width, 0.5, np.float32)
    density = replace(one_gaussian(width), scores=scores, knots=knots, spread=spread)
    # More than are compared at once; on knots, between them and beyond them.
    vectors = random.integers(-50, 50, (150, width)).astype(np.float32) / 2
    expected = np.empty(vectors.shape)
    for column in range(width):
        values, own = vectors[:, column].astype(np.float64), knots[:, column].astype(np.float64)
        beyond = np.maximum(values - own[-1], 0) - np.maximum(own[0] - values, 0)
        expected[:, column] = np.interp(values, own, scores) + beyond / 0.5
    np.testing.assert_allclose(density.normal(vectors), expected, rtol=1e-14, atol=1e-14)


def test_a_mixture_is_the_sum_of_its_components():
    random = np.random.default_rng(0)
    one = one_gaussian(3)
    width = len(one.axes)
    factors = np.triu(random.uniform(0.5, 2, (2, width, width))).astype(np.float32)
    means = random.standard_normal((2, width)).astype(np.float32)
    weights = np.log(np.array([0.3, 0.7], np.float32))
    both = replace(one, weights=weights, means=means, factors=factors)
    vectors = random.standard_normal((5, 3)).astype(np.float32)
    apart = [
        replace(one, weights=weights[n : n + 1], means=means[n : n + 1], factors=factors[n : n + 1])
        for n in range(2)
    ]
    logs = [density.score_all(vectors) for density in apart]
    assert both.score_all(vectors) == pytest.approx(np.logaddexp(*logs))
    # Of the first by its formula: log w + log det F - d/2 log 2 pi - |(x - m) F|^2 / 2.
    away = (both.places(vectors) - means[0]) @ factors[0]
    volume = np.log(np.diag(factors[0])).sum() - width / 2 * np.log(2 * np.pi)
    assert logs[0] == pytest.approx(weights[0] + volume - (away**2).sum(1) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("means"), "have no means"),
        (lambda a: a.update(spread=a["spread"][:1]), "are needed"),
        (lambda a: a.update(knots=a["knots"][0]), "do not fit together"),
        (lambda a: a.update(factors=a["factors"] * np.float32("nan")), "finite float32"),
        (lambda a: a.update(mean=a["mean"].astype(np.float64)), "finite float32"),
    ],
)
def test_statistics_of_another_form_are_refused(change, words):
    arrays = dict(vars(one_gaussian(4)))
    change(arrays)
    with pytest.raises(BundleError, match=words):
        Density.of(arrays)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"min_side": 300}, "too_small"),
        ({"light": 250.0}, "too_dark"),
        ({"shade": 10.0}, "too_bright"),
        ({"contrast": 90.0}, "no_contrast"),
        ({"sharpness": 9.0}, "blurred"),
        ({"grain": -9.0}, "noisy"),
        ({"appearance": 0.0}, "unlike_training"),
        ({"features": 0.0}, "unlike_features"),
        ({"textures": 0.1}, "other_texture"),
    ],
)
def test_every_limit_has_its_reason(given, code):
    features = np.zeros(5, np.float32)
    assert lenient(5).reasons(lesion(), features) == ()
    (reason,) = lenient(5, **given).reasons(lesion(), features)
    assert reason.code == code
    assert "classifier" in reason.text or "needed" in reason.text or "at most" in reason.text


def test_features_of_another_length_are_an_error():
    with pytest.raises(BundleError, match="python -m training.intake"):
        lenient(5).reasons(lesion(), np.zeros(6, np.float32))


def test_the_statistics_file_is_read_back_and_nothing_else_is(tmp_path):
    intake = lenient(5)
    file = saved(tmp_path, intake)
    again = Intake.open(intake.spec, tmp_path)
    features = np.ones(5, np.float32)
    assert again.scores(lesion(), features) == intake.scores(lesion(), features)
    data = file.read_bytes()
    for damaged in (b"", b"nonsense", data[: len(data) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match="cannot be read"):
            Intake.open(intake.spec, tmp_path)
    np.savez(file, **{"appearance.means": np.array([{}], dtype=object)})
    with pytest.raises(BundleError, match="cannot be read"):
        Intake.open(intake.spec, tmp_path)
    file.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        Intake.open(intake.spec, tmp_path)


def gated(folder: Path, change=lambda manifest: None, **given: float) -> Path:
    """A tiny bundle whose classifier has a gate."""
    write_bundle(folder)
    file = saved(folder, lenient(3))
    content = json.loads((folder / "bundle.json").read_text())
    content["classifier"]["intake"] = {"file": "classifier/intake.npz", **limits(**given)}
    content["files"].append({
        "path": "classifier/intake.npz", "bytes": file.stat().st_size, "sha256": sha256(file)
    })  # fmt: skip
    change(content)
    (folder / "bundle.json").write_text(json.dumps(content))
    return folder


def test_a_bundles_gate_abstains_and_says_why(tmp_path):
    classifier = Classifier.open(gated(tmp_path / "b", light=64.0), ORT)
    pictures = [lesion(), Image.new("RGB", (224, 224)), lesion(100)]
    good, black, other = together = classifier.classify(pictures)
    assert (good.accepted, good.reasons) == (other.accepted, other.reasons) == (True, ())
    assert (black.accepted, black.decision) == (False, "abstain")
    assert [reason.code for reason in black.reasons] == ["too_dark"]
    assert [classifier.classify([picture])[0] for picture in pictures] == together
    free = Classifier.open(tmp_path / "b", ORT, gated=False)
    assert free.classify(pictures)[1].accepted
    assert free.classify(pictures)[0] == good


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["files"].pop(), "has no classifier/intake.npz"),
        (lambda m: m["classifier"]["intake"].update(sharp=1.0), "unknown key 'sharp'"),
        (lambda m: m["classifier"]["intake"].pop("light"), "no key 'light'"),
        (lambda m: m["classifier"]["intake"].update(clipped=50), "clipped needs a share"),
        (lambda m: m["classifier"]["intake"].update(min_side=0), "min_side"),
        (lambda m: m["classifier"]["intake"].update(file="../x.npz"), "leaves the bundle"),
        (lambda m: m["parts"]["classifier"]["outputs"].pop(), "needs the output features"),
    ],
)
def test_a_gate_that_could_not_work_is_refused(tmp_path, change, words):
    with pytest.raises(BundleError, match=words):
        Bundle.open(gated(tmp_path / "b", change))


def test_a_bundle_without_a_gate_accepts_everything(tiny_bundle):
    (found,) = Classifier.open(tiny_bundle, ORT).classify([Image.new("RGB", (224, 224))])
    assert (found.accepted, found.reasons) == (True, ())
    assert tiny_bundle.classifier.intake is None


def test_features_that_are_not_finite_are_no_answer(tiny_bundle):
    def broken(inputs):
        return {"logits": np.zeros((1, 2), np.float32), "features": np.full((1, 3), np.nan)}

    classifier = Classifier(tiny_bundle.classifier, Fake(broken), intake=lenient(3))
    with pytest.raises(EngineError, match="features that are not finite"):
        classifier.classify([lesion()])


def test_a_checkpoints_gate_belongs_to_its_weights(tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "classifier/model.safetensors"
    content = {"weights": sha256(weights), "limits": limits(light=50.0), "more": 1}
    (folder / "classifier/intake.json").write_text(json.dumps(content))
    spec = Checkpoint.open(folder).classifier
    assert (spec.intake.light, spec.intake.file) == (50.0, "classifier/intake.npz")
    assert classifier_spec(folder, gate=False).intake is None
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"other weights .*python -m training\.intake"):
        Checkpoint.open(folder)
    content = {**content, "weights": sha256(weights), "limits": limits(dark=50.0)}
    (folder / "classifier/intake.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="unknown key 'dark'"):
        Checkpoint.open(folder)
