"""A classifier's figures on labelled pictures: from a folder, from a bundle, and refused ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.errors import DatasetError
from dermaflux.intake import Reason
from training import data, evaluate, judging, leaks, local_threshold, recount
from training.raw_scores import RawScores, decisions

CALIBRATION = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6], "shift": 0.0}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path) -> Path:
    """A ViT of random weights, cropped to 0.9 of a picture."""
    return tiny_checkpoint / "classifier"


@pytest.fixture
def ran(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Status, last line and complaints of the command, writing into `tmp_path / "out"`."""

    def run(classifier: Path, *options: object) -> tuple[int, dict[str, Any], str]:
        given = [str(classifier), "--out", str(tmp_path / "out"), *map(str, options)]
        code = evaluate.main([*given, "--draws", "40", "--threads", "1"])
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        return code, json.loads(lines[-1]) if lines else {}, printed.err

    return run


def _copied(dataset: Path, to: Path, **changed: object) -> Path:
    """The dataset with values of every line changed."""
    shutil.copytree(dataset, to)
    lines = [json.loads(line) for line in (to / "metadata.jsonl").read_text().splitlines()]
    (to / "metadata.jsonl").write_text("".join(json.dumps(x | changed) + "\n" for x in lines))
    return to


def test_a_folders_figures_are_recomputed_from_what_it_wrote(
    dataset: Path, folder: Path, tmp_path: Path, ran: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = ran(folder, "--data", dataset, "--threshold-for", "0.9")
    out = tmp_path / "out"
    assert code == 0
    assert told["pictures"] == told["test"]["drawn"]["whole"]["images"] == 6
    # With as many draws as the report says; with others the intervals are others.
    assert recount.main([str(out / "scores.csv"), "--draws", "10"]) == 1
    capsys.readouterr()
    assert recount.main([str(out / "scores.csv")]) == 0
    recomputed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((out / "report.json").read_text())
    assert recomputed["test"] == report["test"]
    assert report["calibration"]["threshold"] == 0.4  # config.json's own
    assert report["suggestion"]["all"]["sensitivity"]["value"] >= 0.9
    assert "by_source" not in report["suggestion"]
    assert "--seen" in report["note"]
    assert report["settings"]["split"] == "test"
    assert {file.name for file in (out / "plots").iterdir()} == {
        "roc_drawn.png", "reliability_drawn.png"
    }  # fmt: skip
    raw = RawScores.read(out / "scores.csv")
    assert raw.file.tolist() == [f"{number:03}.png" for number in range(14, 20)]
    assert np.isfinite(raw.border_only).all()
    assert np.isnan(raw.lesion_masked).all()  # no masks


def test_all_splits_are_tested_where_that_is_asked_for(
    dataset: Path, folder: Path, ran: Any
) -> None:
    assert ran(folder, "--data", dataset, "--split", "all")[1]["pictures"] == 20
    code, _, said = ran(folder, "--data", dataset, "--split", "all", "--conformal-from", "val")
    assert (code, "is tested too" in said) == (2, True)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_gives_what_its_service_gives(
    dataset: Path, tiny_bundle: Bundle, tmp_path: Path, ran: Any, precision: str
) -> None:
    options = ["--data", dataset, "--engine", "onnxruntime-cpu", "--precision", precision]
    code, told, _ = ran(tiny_bundle.path, *options, "--conformal-from", "val")
    assert code == 0
    raw = RawScores.read(tmp_path / "out" / "scores.csv")
    served = Classifier.open(tiny_bundle, "onnxruntime-cpu", precision, threads=1)
    for row in range(6):
        with Image.open(dataset / raw.file[row]) as image:
            one = served.classify([image.convert("RGB")])[0]
        assert raw.probability[row] == pytest.approx(one.probability, abs=1e-6)
        assert raw.decision[row] == one.decision
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["classifier"]["precision"] == precision
    assert report["calibration"]["conformal"]["fitted_to"] == "split val"
    assert report["test"]["drawn"]["whole"]["conformal"]["coverage"]["value"] is not None
    assert (raw.split == "val").sum() == 6  # kept, so that the limits can be set again
    assert told["test"]["drawn"]["whole"]["images"] == 6


def test_oblong_pictures_are_cut_as_the_service_cuts_them(
    folder: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    from dermaflux.checkpoint import classifier_spec
    from dermaflux.engines import eager

    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "oblong.bmp")  # no format of the service's
    found = judging.from_folder(folder, threads=1).look([judging.picture(tmp_path / "oblong.bmp")])
    spec = classifier_spec(tiny_checkpoint)
    assert spec is not None
    served = Classifier(spec, eager.load(tiny_checkpoint, "classifier"))
    expected = served.classify([Image.fromarray(pixels)])[0].logits
    np.testing.assert_allclose(found[0][0], expected, atol=1e-5)


def test_the_report_beside_gives_limits_of_its_own_temperature_alone(
    folder: Path, tmp_path: Path
) -> None:
    limits = {"alpha": 0.1, "benign_up_to": 0.7, "malignant_from": 0.2}
    told = {"temperature": 1.5, "threshold": 0.9, "shift": -0.4, "conformal": limits}
    (tmp_path / "report.json").write_text(json.dumps({"calibration": told}))
    found = judging.from_folder(folder, tmp_path / "report.json", 1).calibration
    assert (found["threshold"], found["shift"], found["conformal"]) == (0.4, -0.4, limits)
    other = {"calibration": told | {"temperature": 1.2}}
    (tmp_path / "report.json").write_text(json.dumps(other))
    found = judging.from_folder(folder, tmp_path / "report.json", 1).calibration
    assert found["shift"] == 0
    assert "conformal" not in found
    assert "another temperature" in found["note"]
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(DatasetError, match="no report with a calibration"):
        judging.from_folder(folder, tmp_path / "report.json", 1)


def test_pictures_that_were_seen_are_refused_or_left_out_with_their_lesion(
    dataset: Path, folder: Path, tmp_path: Path, ran: Any
) -> None:
    # 15 was learnt, and 16 is another picture of its lesion.
    own = tmp_path / "own"
    shutil.copytree(dataset, own)
    text = (own / "metadata.jsonl").read_text()
    text = text.replace('"group": "015.png"', '"group": "g"').replace(
        '"group": "016.png"', '"group": "g"'
    )
    (own / "metadata.jsonl").write_text(text)
    learnt = [one for one in data.read(dataset) if one.name == "015.png" or one.split == "train"]
    leaks.index(learnt, 1).save(tmp_path / "seen.npz")
    options = ["--data", own, "--seen", tmp_path / "seen.npz"]
    code, _, said = ran(folder, *options)
    assert code == 2
    assert "1 of 6 test pictures were seen by the classifier" in said
    assert "--leave-out" in said
    assert not (tmp_path / "out").exists()
    code, told, _ = ran(folder, *options, "--leave-out")
    assert (code, told["pictures"], told["left_out"]) == (0, 4, 2)
    raw = RawScores.read(tmp_path / "out" / "scores.csv")
    assert raw.file.tolist() == ["014.png", "017.png", "018.png", "019.png"]
    leaks.index(data.read(own), 1).save(tmp_path / "seen.npz")
    assert "has seen all 6 pictures" in ran(folder, *options, "--leave-out")[2]
    assert "give --seen" in ran(folder, "--data", own, "--leave-out")[2]


def test_pictures_of_one_class_give_no_auc_and_say_why(
    dataset: Path, folder: Path, tmp_path: Path, ran: Any
) -> None:
    own = _copied(dataset, tmp_path / "benign", label="benign")
    code, told, _ = ran(folder, "--data", own, "--threshold-for", "0.95")
    whole = told["test"]["drawn"]["whole"]
    assert code == 0
    assert whole["auc"] is None
    assert "one class" in whole["note"]
    assert told["test"]["drawn"]["sensitivity"] is None
    assert told["test"]["drawn"]["specificity"] is not None
    assert told["suggestion"]["all"]["threshold"]["value"] is None
    assert "one class" in told["suggestion"]["all"]["note"]
    assert [file.name for file in (tmp_path / "out/plots").iterdir()] == ["reliability_drawn.png"]


def test_what_cannot_be_tested_is_refused_before_anything_is_written(
    dataset: Path, folder: Path, tmp_path: Path, tiny_checkpoint: Path, ran: Any
) -> None:
    made = _copied(dataset, tmp_path / "made", confirmed="synthetic")
    assert "are generated pictures" in ran(folder, "--data", made)[2]
    assert "given twice" in ran(folder, "--data", dataset, "--data", dataset)[2]
    train = _copied(dataset, tmp_path / "train", split="train")
    assert "there are train 20); give --split all" in ran(folder, "--data", train)[2]
    assert "are of bundles" in ran(folder, "--data", dataset, "--precision", "int8")[2]
    assert f"do you mean {folder}?" in ran(tiny_checkpoint, "--data", dataset)[2]
    own = tmp_path / "classifier"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    del config["dermaflux"]
    (own / "config.json").write_text(json.dumps(config))
    assert "has no calibration" in ran(own, "--data", dataset)[2]
    broken = _copied(dataset, tmp_path / "broken")
    (broken / "017.png").write_bytes(b"none")
    code, _, said = ran(folder, "--data", broken)
    assert code == 2
    assert "017.png cannot be read as a picture" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        ran(folder, "--data", dataset, "--threshold-for", "1.2")


def test_a_classifiers_own_report_is_not_written_over(folder: Path, dataset: Path) -> None:
    assert evaluate.main([str(folder), "--data", str(dataset), "--out", str(folder)]) == 2
    assert not (folder / "scores.csv").exists()


def _raw(probability: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> RawScores:
    count = len(labels)
    texts = np.full(count, "")
    unknown = np.full(count, np.nan)
    return RawScores(
        file=texts, group=np.arange(count).astype(str), source=np.full(count, "s"), confirmed=texts,
        split=np.full(count, "test"), label=labels, diagnosis=texts, age=unknown, sex=texts,
        site=texts, skin_type=texts, logit_benign=np.zeros(count),
        logit_malignant=np.log(probability / (1 - probability)), probability=probability,
        decision=decisions(probability, CALIBRATION), border_only=unknown, lesion_masked=unknown,
    )  # fmt: skip


def test_the_suggested_threshold_is_the_highest_that_keeps_enough() -> None:
    malignant = np.arange(0.105, 0.95, 0.0425)[:20]
    benign = np.linspace(0.01, 0.6, 50)
    raw = _raw(np.concatenate([malignant, benign]), np.repeat([1, 0], [20, 50]))
    found = local_threshold.suggested(raw, 0.95, 200)
    # One of twenty may be lost: the second lowest is the threshold, rounded down.
    assert found["threshold"]["value"] == pytest.approx(0.1475)
    assert found["sensitivity"]["value"] == 0.95
    assert found["specificity"]["value"] == pytest.approx(np.mean(benign < 0.1475), abs=1e-4)
    low, high = found["threshold"]["interval"]
    assert low < 0.1475 < high
    # A threshold loses more of the lesions that it was not set by.
    assert found["on_others"]["sensitivity"]["value"] < 0.95
    assert "note" not in found
    few = local_threshold.suggested(raw.where(np.arange(70) > 5), 0.95, 200)
    assert "14 malignant pictures are too few" in few["note"]
    assert few["sensitivity"]["value"] == 1
    assert local_threshold.suggested(raw, 1.0, 50)["threshold"]["value"] == 0.105


def test_a_threshold_is_not_suggested_from_scores_that_are_no_numbers() -> None:
    raw = _raw(np.array([0.2, 0.4, 0.6]), np.array([0, 1, 1]))
    found = local_threshold.suggested(replace(raw, probability=np.array([0.2, np.nan, 0.6])), 0.9)
    assert found["threshold"]["value"] is None
    assert "no numbers" in found["on_others"]["sensitivity"]["note"]


def test_the_gates_refusals_are_counted_by_source_and_label() -> None:
    raw = _raw(np.array([0.2, 0.4, 0.6, 0.7]), np.array([0, 0, 1, 1]))
    raw = replace(raw, source=np.array(["a", "a", "a", "b"]))
    dark = Reason("too_dark", "")
    refused = [(dark,), (), (dark, Reason("blurred", "")), ()]
    found = evaluate.gate(raw, refused)
    assert found["a"] == {"images": 3, "refused": 0.6667, "benign": 0.5, "malignant": 1.0,
                          "by": {"too_dark": 2, "blurred": 1}}  # fmt: skip
    assert found["b"] == {"images": 1, "refused": 0.0, "benign": None, "malignant": 0.0, "by": {}}


def test_a_gated_bundles_figures_are_of_all_pictures(
    dataset: Path, tiny_bundle: Bundle, ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gate:
        """Refuses everything."""

        def reasons(self, picture: Image.Image, features: object) -> tuple[Reason, ...]:
            return (Reason("too_dark", ""),)

    options = ["--data", dataset, "--engine", "onnxruntime-cpu", "--precision", "fp32"]
    free = ran(tiny_bundle.path, *options)[1]
    opened = Classifier.open(tiny_bundle, "onnxruntime-cpu", "fp32", threads=1)
    gated = Classifier(opened.spec, opened.engine, intake=Gate())  # type: ignore[arg-type]
    monkeypatch.setattr(Classifier, "open", lambda *_, **__: gated)
    code, told, _ = ran(tiny_bundle.path, *options)
    assert (code, told["test"]) == (0, free["test"])
    assert told["gate"]["drawn"]["refused"] == 1
    assert told["gate"]["drawn"]["by"] == {"too_dark": 6}
    assert told["accepted"] == {}
    assert "gate" not in free


def test_figures_of_accepted_pictures_are_without_the_refused() -> None:
    probability = np.array([0.2, 0.9, 0.6, 0.7, 0.1])
    raw = replace(_raw(probability, np.array([0, 0, 1, 1, 0])), split=np.full(5, "test"))
    dark = (Reason("too_dark", ""),)
    calibration = {"threshold": 0.5, "temperature": 1.0, "shift": 0.0, "abstain": [0.0, 0.0]}
    found = evaluate.accepted(raw, [(), dark, (), (), ()], calibration, 20)
    (source,) = found
    assert found[source]["specificity"] == 1.0
    assert found[source]["whole"]["auc"] == 1.0
    assert evaluate.accepted(raw, [dark] * 5, calibration, 20) == {}
