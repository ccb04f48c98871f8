"""Raw scores in a file, and every figure of the report out of them again."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermaflux.errors import DatasetError
from training import data, evaluation, recount, scores, subgroups
from training.figures import Floats, Pixels
from training.raw_scores import RawScores, decisions, probabilities
from training.recipe import Recipe

DRAWS = 60
CALIBRATION: dict[str, Any] = {
    "temperature": 0.9, "threshold": 0.3, "abstain": [0.2, 0.4], "shift": -0.5,
    "conformal": {"alpha": 0.1, "benign_up_to": 0.6, "malignant_from": 0.2},
}  # fmt: skip


def _raw(count: int = 240, seed: int = 0) -> RawScores:
    """Two sources, of which one says how its labels are known; two pictures a lesion there."""
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.4).astype(np.int64)
    rows = np.arange(count)
    labels[rows % 4 == 3] = labels[rows[rows % 4 == 3] - 1]
    logits = np.stack([np.zeros(count), random.normal(2 * labels - 1)], axis=1)
    known = rows % 4 >= 2
    p = probabilities(logits, CALIBRATION["temperature"])
    return RawScores(
        file=np.array([f"images/{n}.jpg" for n in rows]),
        group=np.array([f"g{n - n % 2 if known[n] else n}" for n in rows]),
        source=np.where(known, "HAM, with follow-up", 'ISIC "2017"'),
        confirmed=np.where(known, np.where(rows % 8 >= 6, "follow_up", "histo"), ""),
        split=np.full(count, "test"),
        label=labels,
        diagnosis=np.where(labels == 1, "melanoma", "nevus"),
        age=np.where(rows % 7 == 0, np.nan, 20.0 + rows % 70),
        sex=np.array(["female", "male", ""])[rows % 3],
        site=np.array(["back", "face"])[(rows > 8).astype(int)],
        skin_type=np.full(count, ""),
        logit_benign=logits[:, 0],
        logit_malignant=logits[:, 1],
        probability=p,
        decision=decisions(p, CALIBRATION),
        border_only=random.normal(size=count),
        lesion_masked=np.where(rows % 5 == 0, np.nan, random.normal(size=count)),
    )


@pytest.fixture(scope="module")
def raw() -> RawScores:
    return _raw()


@pytest.fixture(scope="module")
def found(raw: RawScores) -> dict[str, Any]:
    return evaluation.figures(raw, CALIBRATION, DRAWS)


def test_raw_scores_are_read_as_they_were_written(raw: RawScores, tmp_path: Path) -> None:
    raw.write(tmp_path / "scores.csv")
    again = RawScores.read(tmp_path / "scores.csv")
    for column in fields(RawScores):
        one, other = getattr(raw, column.name), getattr(again, column.name)
        assert one.dtype.kind == other.dtype.kind, column.name
        np.testing.assert_array_equal(one, other, column.name)


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("probability", "much", "line 3: probability 'much' is no number"),
        ("label", "1", "line 3: label '1' is not one of benign, malignant"),
        ("decision", "", "line 3: decision '' is not one of benign, malignant, abstain"),
        ("logit_benign", "", "line 3: logit_benign '' is no number"),
        (None, "", "line 3: has 1 fields and needs 17"),
    ],
)
def test_a_damaged_table_is_told_with_its_line(
    raw: RawScores, tmp_path: Path, column: str | None, text: str, said: str
) -> None:
    file = tmp_path / "scores.csv"
    raw.write(file)
    with file.open(newline="") as stream:
        lines = list(csv.reader(stream))
    if column is None:
        lines[2] = ["x"]
    else:
        lines[2][lines[0].index(column)] = text
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(lines)
    with pytest.raises(DatasetError, match=said):
        RawScores.read(file)


def test_another_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("file,label\na.png,benign\n")
    with pytest.raises(DatasetError, match=r"there is no group, source, .*training\.vit"):
        RawScores.read(file)
    with pytest.raises(DatasetError, match="cannot be read"):
        RawScores.read(tmp_path / "none.csv")


def test_every_figure_of_a_confirmed_source_is_given_for_histology_and_controls(
    raw: RawScores, found: dict[str, Any]
) -> None:
    ham, isic = found["HAM, with follow-up"], found['ISIC "2017"']
    own = raw.where(raw.confirmed == "histo")
    assert ham["histology"] == evaluation._block(own, CALIBRATION, DRAWS)
    assert ham["histology_border_only"]["images"] == len(own)
    assert isic.keys() == ham.keys() - {
        "histology", "histology_border_only", "histology_lesion_masked"
    }  # fmt: skip
    for name in ("metrics", "conformal", "subgroups"):
        assert ham["histology"][name].keys() == ham["whole"][name].keys()
    assert ham["whole"]["groups"] == ham["whole"]["images"] / 2
    assert ham["histology"]["images"] < ham["whole"]["images"]
    assert ham["lesion_masked"]["images"] < ham["border_only"]["images"]
    above = ham["border_only"]["model_above_it"]
    assert above["value"] == pytest.approx(
        ham["whole"]["auc"] - ham["border_only"]["auc"], abs=2e-4
    )
    for block in (ham["whole"], ham["histology"], isic["whole"]):
        for name, entry in block["metrics"].items():
            low, high = entry["interval"]
            assert low <= high, name
            if name != "calibration_error":
                assert low <= entry["value"] <= high, name
    assert ham["sensitivity"] == ham["whole"]["metrics"]["sensitivity"]["value"]
    assert ham["calibration_error"] == ham["whole"]["metrics"]["calibration_error"]["value"]


def test_subgroups_hold_every_picture_once(raw: RawScores, found: dict[str, Any]) -> None:
    whole = found["HAM, with follow-up"]["whole"]
    assert "skin_type" not in whole["subgroups"]
    for attribute, groups in whole["subgroups"].items():
        for count in ("images", "malignant"):
            assert sum(group[count] for group in groups.values()) == whole[count], attribute
    ages = list(whole["subgroups"]["age"])
    assert ages == ["under 30", "30 to 44", "45 to 59", "60 to 74", "75 on", "unknown"]
    of = raw.where((raw.source == "HAM, with follow-up") & (raw.sex == "male"))
    male = whole["subgroups"]["sex"]["male"]
    called = of.probability >= 0.3
    assert male["sensitivity"]["value"] == pytest.approx(np.mean(called[of.label == 1]), abs=1e-4)
    assert male["abstained"]["value"] == pytest.approx(np.mean(of.decision == "abstain"), abs=1e-4)
    assert male["conformal"]["coverage"]["interval"]


def test_an_age_is_in_the_band_that_begins_with_it(raw: RawScores) -> None:
    ages = [0, 29.5, 30, 44, 45, 59, 60, 74, 75, 130, np.nan]
    some = replace(raw.where(np.arange(len(ages))), age=np.array(ages, float))
    assert subgroups.columns(some)["age"].tolist() == [
        *["under 30"] * 2, *["30 to 44"] * 2, *["45 to 59"] * 2, *["60 to 74"] * 2,
        *["75 on"] * 2, "unknown",
    ]  # fmt: skip


def test_decisions_are_those_of_the_service() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.399, 0.4, 0.9, np.nan])
    assert decisions(p, CALIBRATION).tolist() == [
        "benign", "abstain", "abstain", "abstain", "malignant", "malignant", "abstain"
    ]  # fmt: skip
    outside = CALIBRATION | {"abstain": [0.3, 0.3]}
    assert decisions(p[:3], outside).tolist() == ["benign", "benign", "malignant"]


def test_small_subgroups_are_listed_with_their_counts() -> None:
    raw = _raw(60).where(np.arange(60) % 4 < 2)
    site = subgroups.figures(raw, CALIBRATION, DRAWS)["site"]
    assert set(site["back"]) == {"images", "malignant", "groups", "note"}
    assert site["back"]["note"].startswith("too small")
    nevi = subgroups.figures(raw, CALIBRATION, DRAWS)["diagnosis"]["nevus"]
    assert nevi["auc"] == {
        "value": None, "interval": None, "note": "too few: 0 malignant, and 10 are needed"
    }  # fmt: skip
    assert nevi["specificity"]["value"] is not None
    for entry in (nevi["sensitivity"], nevi["conformal"]["coverage_malignant"]):
        assert entry == nevi["auc"]


@pytest.mark.parametrize(
    ("rows", "changed", "note"),
    [
        (slice(0), {}, "no images"),
        (slice(None), {"label": 0}, "images of one class only: no AUC"),
        (slice(None), {"logit_malignant": 0.0, "probability": 0.5}, "all scores are equal"),
        (slice(None), {"logit_malignant": np.nan, "probability": np.nan}, "are no numbers"),
        (slice(1), {}, "images of one class only"),
    ],
)
def test_degenerate_scores_give_none_and_say_why(
    raw: RawScores, rows: slice, changed: dict[str, float], note: str
) -> None:
    some = raw.where(raw.confirmed == "histo").where(rows)
    values = {k: np.full(len(some), v, getattr(some, k).dtype) for k, v in changed.items()}
    some = replace(some, **values)
    block = evaluation._block(some, CALIBRATION, DRAWS)
    assert (block["auc"], block["interval"]) == (None, None)
    assert note in block["note"]
    whole = evaluation.figures(some, CALIBRATION, DRAWS)
    json.dumps([block, whole, evaluation.brief(whole)], allow_nan=False)
    assert recount.tables(whole) is not None


def _logits(images: Pixels) -> Floats:
    """A model that looks at how dark a picture's middle is."""
    middle = images[:, 10:22, 10:22].mean((1, 2, 3))
    return np.stack([np.zeros(len(images)), (140 - middle) / 20], axis=1)


def _reported(dataset: Path, out: Path) -> dict[str, Any]:
    validation, test = data.read(dataset, "val"), data.read(dataset, "test")
    test = [replace(s, confirmed="histo") for s in test]
    logits = _logits(data.load_images(validation, 32))
    labels = np.array([s.lesion.label == "malignant" for s in validation]).astype(np.int64)
    calibration = scores.calibrate(logits, labels, 1.7, Recipe()) | {"shift": 0.25}
    figures = scores.report(_logits, test, calibration, 32, validation=validation, out=out)
    (out / "report.json").write_text(json.dumps({"calibration": calibration, "test": figures}))
    return figures


def test_the_report_is_recomputed_from_its_raw_scores(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classifier"
    figures = _reported(dataset, out)
    assert {file.name for file in (out / "plots").iterdir()} == {
        "roc_drawn.png", "reliability_drawn.png"
    }  # fmt: skip
    table = RawScores.read(out / "scores.csv")
    assert dict(zip(*np.unique(table.split, return_counts=True), strict=True)) == {
        "test": 6, "val": 6
    }  # fmt: skip
    assert table.file[0] == "014.png"  # as the dataset names it, wherever it lies
    assert np.isnan(table.border_only).sum() == 6
    assert recount.main([str(out / "scores.csv")]) == 0
    printed = capsys.readouterr().out
    assert "| AUC | 1 (" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["equal"] is True
    assert last["test"] == json.loads(json.dumps(figures))
    # A changed score is seen, by what follows from it and by the table's own columns.
    lines = (out / "scores.csv").read_text().splitlines()
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    rows[1][rows[0].index("logit_malignant")] = "9.0"
    rows[1][rows[0].index("probability")] = "0.99"
    assert rows[1] != lines[1].split(",")
    with (out / "scores.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    assert recount.main([str(out / "scores.csv")]) == 1
    said = capsys.readouterr().err
    assert "1 probabilities are not those of their logits" in said
    assert "test.drawn.whole.metrics.brier.value" in said


def test_scores_without_their_report_are_refused(
    raw: RawScores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw.write(tmp_path / "scores.csv")
    assert recount.main([str(tmp_path / "scores.csv")]) == 2
    assert "--report FILE" in capsys.readouterr().err
    (tmp_path / "report.json").write_text('{"calibration": {}, "test": {}}')
    assert recount.main([str(tmp_path / "scores.csv")]) == 2
    assert "there is no temperature" in capsys.readouterr().err


def test_differences_are_named_and_the_last_digit_is_none() -> None:
    stated = {"a": {"auc": 0.8123, "interval": [0.7, 0.9]}, "n": 3, "note": "x", "b": None}
    assert not list(recount.differing(stated, stated | {"a": stated["a"] | {"auc": 0.8124}}))
    other = {"a": {"auc": 0.8126, "interval": [0.7, 0.8]}, "n": 3, "note": "y", "c": 1}
    said = list(recount.differing(stated, other))
    assert [one.split(":")[0] for one in said] == [
        "test.a.auc", "test.a.interval[1]", "test.b", "test.c", "test.note"
    ]  # fmt: skip


def test_a_model_that_diverged_is_not_calibrated() -> None:
    logits, labels = np.zeros((6, 2)), np.array([0, 1] * 3)
    logits[2, 1] = np.nan
    with pytest.raises(DatasetError, match="1 of 6 validation pictures .* diverged"):
        scores.platt(logits, labels)
    with pytest.raises(DatasetError, match="diverged"):
        scores.calibrate(logits, labels, 1.0, Recipe())
    with pytest.raises(DatasetError, match="of one class"):
        scores.calibrate(np.zeros((6, 2)), np.zeros(6, np.int64), 1.0, Recipe())


def test_people_are_known_as_the_dataset_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    row = {"file_name": "images/a.png", "label": "benign", "age": 51, "sex": "female",
           "site": "back", "skin_type": "V"}  # fmt: skip
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    sample = data.read(folder)[0]
    bare = replace(sample, name="", age=None, sex=None, site=None, skin_type=None)
    raw = RawScores.of([sample, bare], np.array([[0.0, 1.0]] * 2), CALIBRATION)
    assert (raw.age[0], raw.sex[0], raw.site[0], raw.skin_type[0]) == (51, "female", "back", "V")
    assert np.isnan(raw.age[1])
    assert (raw.sex[1], raw.site[1], raw.skin_type[1]) == ("", "", "")
    assert raw.file.tolist() == ["images/a.png", "a.png"]
