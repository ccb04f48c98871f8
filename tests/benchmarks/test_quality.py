from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import quality, quality_classifier, quality_sides, similarity
from benchmarks.counting import Counted
from benchmarks.stages import STAGES, Spent
from benchmarks.variants import Variant
from dermaflux import dataset
from dermaflux.bundle import Bundle
from dermaflux.classifier import Prediction
from dermaflux.errors import DatasetError
from dermaflux.pipeline import Pipeline
from tests.tiny_bundle import write_bundle


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Twelve photographs of six lesions, half of them malignant and darker."""
    folder = tmp_path / "collection"
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(12):
        malignant = number % 2 == 1
        pixels = np.random.default_rng(number).integers(0, 120 if malignant else 255, (40, 50, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{number}.jpg")
        records.append(
            dataset.Record(
                file_name=f"images/{number}.jpg",
                label="malignant" if malignant else "benign",
                group=f"lesion {number // 4 * 2 + malignant}",
                split="test" if number < 10 else "train",
            )
        )
    dataset.write(folder, records)
    return folder


def test_the_command_compares_with_a_reference_and_a_control(
    tiny_bundle: Bundle, collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    words = ["--bundle", str(tiny_bundle.path), "--prompts", "2", "--size", "32", "--out", str(out)]
    assert quality.main([*words, "--photographs", str(collection)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["reference"] == "onnxruntime-cpu fp32"
    assert set(result["variants"]) == {
        "onnxruntime-cpu int8", "openvino-cpu fp32", "openvino-cpu int8"
    }  # fmt: skip
    # Its int8 file is the fp32 one by another name.
    same = result["variants"]["onnxruntime-cpu int8"]
    assert same["psnr_db"]["worst"] == 99
    assert same["ssim"]["worst"] == 1
    assert same["classifier"]["labels_equal"] == 1
    control = same["fewer_steps_fp32"]
    assert 1 <= control["steps"] <= 4
    assert control["drawn_with"].endswith("fp32")
    assert same["beats_fewer_steps_fp32"] == (control["psnr_db"]["median"] < 99)
    assert "fewer_steps_fp32" not in result["variants"]["openvino-cpu fp32"]
    judged = result["classifier"]
    assert (judged["photographs"], judged["malignant"], judged["groups"]) == (10, 5, 6)
    assert judged["variants"]["onnxruntime-cpu int8"]["auc_change"] == 0
    assert judged["variants"]["onnxruntime-cpu int8"]["decisions_changed"] == 0


def test_images_that_are_too_far_are_status_1(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--bundle", str(tiny_bundle.path), "--prompts", "1", "--size", "32", "--steps", "2"]
    assert quality.main([*words, "--fail-under", "200"]) == 1
    assert "under 200" in capsys.readouterr().err


def test_as_many_steps_as_fit_in_the_time(fake_pipeline: Pipeline) -> None:
    side = quality_sides.Side(fake_pipeline, steps=10)
    # Half a second of everything else, and a tenth for each step.
    others = dict.fromkeys(STAGES, 0.1) | {"denoise": 1.0}
    side.spent = [Spent(others, (0.1,) * 10)]
    assert [side.fewer(seconds) for seconds in (0.1, 0.75, 1.05, 99)] == [1, 2, 5, 10]
    quick = Spent(dict.fromkeys(STAGES, 0.1) | {"denoise": 0.35}, (0.1,) * 10, calls=6)
    variant = quality_sides.Side(fake_pipeline, 10, [quick])
    assert quality_sides.fewer_steps("fewer_steps_same_engine", side, variant) == 3
    assert quality_sides.fewer_steps("fewer_steps_same_calls", side, variant) == 6


def test_a_forecasting_tier_is_also_held_against_its_own_engine(
    fake_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_sides, "forecasts", lambda name: name == "cached")

    def side(engine: str, precision: str, seconds: float) -> quality_sides.Side:
        pipeline = copy.copy(fake_pipeline)
        named = Counted(fake_pipeline.engines["transformer"])
        named.name, named.precision = engine, precision
        pipeline.engines = {"transformer": named}
        spent = Spent(dict.fromkeys(STAGES, seconds), ())
        return quality_sides.Side(pipeline, 4, [spent])

    found = [
        Variant("eager"), Variant("openvino-cpu", "fp32"), Variant("openvino-cpu", "int8"),
        Variant(tier="lossless"), Variant(tier="int8"), Variant(tier="cached"),
    ]  # fmt: skip
    sides = {
        "eager": side("eager", "fp32", 3),
        "openvino-cpu fp32": side("openvino-cpu", "fp32", 2),
        "openvino-cpu int8": side("openvino-cpu", "int8", 1.1),
        "tier lossless": side("openvino-cpu", "fp32", 2.1),
        "tier int8": side("openvino-cpu", "int8", 1),
        "tier cached": side("openvino-cpu", "int8", 0.5),
    }
    told = quality_sides.controls(sides, found)
    assert told["openvino-cpu fp32"] == told["tier lossless"] == {}
    assert told["openvino-cpu int8"] == {"fewer_steps_fp32": "openvino-cpu fp32"}
    assert told["tier int8"] == {"fewer_steps_fp32": "openvino-cpu fp32"}
    assert told["tier cached"] == {
        "fewer_steps_fp32": "openvino-cpu fp32",
        "fewer_steps_same_engine": "openvino-cpu int8",
        "fewer_steps_same_calls": "openvino-cpu int8",
    }


def test_every_side_draws_the_same_seed(fake_pipeline: Pipeline) -> None:
    asked = quality_sides.Asked(["a benign lesion", "a malignant lesion"], seed=0, size=32)
    sides = {name: quality_sides.Side(fake_pipeline, 2) for name in ("one", "other")}
    seconds = quality_sides.measure(sides, asked, 2)
    assert len(seconds["one"]) == len(sides["one"].spent) == 2
    for number in (0, 1):
        assert (sides["one"].made[number] == sides["other"].made[number]).all()
    assert (sides["one"].made[0] != sides["one"].made[1]).any()


def test_auc_is_that_of_scikit_learn_with_ties_and_weights() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(1)
    positive = random.random(200) < 0.3
    scores = np.round(random.random(200) + 0.2 * positive, 1).astype(np.float64)
    assert similarity.auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    weights = random.integers(0, 4, (5, 200)).astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=one) for one in weights]
    assert similarity.auc(scores, positive, weights) == pytest.approx(expected)


def test_a_change_of_auc_has_an_interval_over_groups() -> None:
    random = np.random.default_rng(2)
    positive = np.repeat(random.random(100) < 0.4, 2)
    base = random.random(200) + 0.3 * positive
    apart, alike = [str(n) for n in range(200)], [str(n // 2) for n in range(200)]
    assert similarity.auc_change(base, base, positive, apart) == (0, 0, 0)
    noise = np.repeat(random.standard_normal(100), 2) * 0.3
    change, low, high = similarity.auc_change(base + noise, base, positive, apart)
    assert low < change < high
    # Pictures of a lesion move together: half as many that are independent, so a wider interval.
    _, low_of_groups, high_of_groups = similarity.auc_change(base + noise, base, positive, alike)
    assert high_of_groups - low_of_groups > high - low


def test_what_the_classifier_decides_otherwise_is_counted() -> None:
    def said(probability: float, decision: str, accepted: bool = True) -> Prediction:
        label = "malignant" if probability >= 0.5 else "benign"
        return Prediction(label, probability, 0.5, decision, (0.0, 0.0), accepted)

    pictures = [
        quality_classifier.Photograph(Path(f"{n}.jpg"), n % 2 == 1, str(n)) for n in range(4)
    ]
    reference = [
        said(0.1, "benign"), said(0.6, "malignant"), said(0.2, "benign"), said(0.9, "malignant")
    ]  # fmt: skip
    ours = [
        said(0.1, "benign"), said(0.4, "abstain"), said(0.45, "benign"),
        said(0.9, "abstain", accepted=False),
    ]  # fmt: skip
    row = quality_classifier.beside(ours, reference, pictures, gated=True)
    assert (row["labels_changed"], row["decisions_changed"], row["gate_changed"]) == (1, 2, 1)
    assert (row["auc"], row["auc_change"]) == (0.75, -0.25)
    assert row["probability_change_most"] == pytest.approx(0.25)
    assert quality_classifier.beside(ours, reference, pictures, gated=False)["gate_changed"] is None


def test_photographs_are_spread_evenly_and_need_both_labels(collection: Path) -> None:
    found = quality_classifier.photographs(collection, "test", 4)
    assert [one.path.name for one in found] == ["0.jpg", "3.jpg", "6.jpg", "9.jpg"]
    with pytest.raises(DatasetError, match="both labels"):
        quality_classifier.photographs(collection, "test", 1)
    with pytest.raises(DatasetError, match="0 photographs in its split 'val'"):
        quality_classifier.photographs(collection, "val", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "0"], "--prompts 0"),
        (["--precision", "fp4"], "fp4"),
        (["--size", "33"], "33"),
        (["--photographs", "nowhere"], "nowhere"),
        (["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    tiny_bundle: Bundle, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(["--bundle", str(tiny_bundle.path), *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


def test_a_bundle_without_a_classifier_draws_all_the_same(
    tmp_path: Path, collection: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bundle(tmp_path / "bundle")
    content = json.loads((folder / "bundle.json").read_text())
    del content["parts"]["classifier"]
    content["classifier"] = None
    content["parity"]["classifier"] = {}
    (folder / "bundle.json").write_text(json.dumps(content))
    words = ["--bundle", str(folder), "--prompts", "1", "--size", "32", "--steps", "1"]
    assert quality.main([*words, "--photographs", str(collection)]) == 2
    assert "has no classifier" in capsys.readouterr().err
    assert quality.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "classifier" not in result["variants"]["openvino-cpu int8"]
