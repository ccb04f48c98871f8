from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dermaflux import thumbnails
from dermaflux.prompt import Lesion
from training import classifier, data, draws, heads, scores, states, supervise, targets, views, vit

RECIPE = classifier.Recipe()


def _sample(label: str, source: str = "a", confirmed: str = "") -> data.Sample:
    return data.Sample(Path("x"), Lesion(label), "train", "g", source, "CC0-1.0", confirmed)


def test_half_of_all_draws_are_malignant() -> None:
    samples = (
        [_sample("benign", "a")] * 90 + [_sample("benign", "b", "histo")] * 900
        + [_sample("malignant", "a")] * 10 + [_sample("malignant", "b", "histo")] * 200
    )  # fmt: skip
    weights = draws.draw_weights(samples).numpy()
    malignant = np.array([s.lesion.label == "malignant" for s in samples])
    assert weights[malignant].sum() == pytest.approx(weights[~malignant].sum())
    small, large = weights[0] * 90, weights[90] * 900
    assert large / small == pytest.approx((900 / 90) ** 0.5)


def test_groups_without_malignant_lesions_count_less() -> None:
    samples = (
        [_sample("benign", "a")] * 100 + [_sample("malignant", "a")] * 100
        + [_sample("benign", "b", "follow_up")] * 100
    )  # fmt: skip
    weights = draws.draw_weights(samples).numpy()
    assert weights[250] < 0.5 * weights[0]
    assert weights[200:].sum() > 0


def _known(mask: np.ndarray, label: int = 0) -> targets.Targets:
    return targets.Targets(
        label=torch.tensor([label]), diagnosis=torch.tensor([-1]),
        structures=torch.full((1, 5), -1.0), mask=torch.from_numpy(mask[None] * np.uint8(255)),
        masked=torch.tensor([True]), box=torch.tensor([targets.box_of(mask)]),
    )  # fmt: skip


def test_a_zoomed_view_holds_the_lesion_and_turns_its_mask_with_it() -> None:
    torch.manual_seed(0)
    mask = np.zeros((144, 144), bool)
    mask[20:60, 80:120] = True
    picture = torch.from_numpy(np.where(mask, 30, 220).astype(np.uint8)).expand(3, -1, -1)
    known, rows = _known(mask), torch.zeros(64, dtype=torch.int64)
    recipe = replace(RECIPE, zoom=1.0)
    shown = views.views(known, rows, recipe)
    pictures, masks = views.augment(picture.expand(64, -1, -1, -1), known.mask[rows], shown, 128)
    assert (masks.mean((1, 2)) > 0.2).all()  # it is 8 % of the whole picture
    inside, outside = masks > 0.9, masks < 0.1
    for image, lesion, skin in zip(pictures.mean(1), inside, outside, strict=True):
        if skin.any():
            assert image[lesion].max() < image[skin].min()


def test_unknown_targets_cost_nothing() -> None:
    torch.manual_seed(0)
    model = heads.Supervised(RECIPE)
    outputs = model(torch.zeros(1, 3, 128, 128))
    known = replace(_known(np.zeros((128, 128), bool)), masked=torch.tensor([False]))
    batch = heads.Mixed(torch.tensor([0]), torch.tensor([0]), 1.0)
    loss, label = heads.losses(
        outputs, known, batch, batch, torch.zeros(1, 128, 128), RECIPE, torch.ones(2)
    )
    assert loss == label


def test_a_killed_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    samples, state = data.read(dataset, "train"), tmp_path / "state" / "vit.pt"
    recipe = replace(RECIPE, hours=2 / 3600, batch=8, threads=1)
    _, before = supervise.fit(samples, recipe, state_file=state)
    _, after = supervise.fit(samples, replace(recipe, hours=4 / 3600), state_file=state)
    assert after.steps > before.steps > 0
    others = [replace(sample, source="other") for sample in samples]
    with pytest.raises(data.DatasetError, match=r"on other data: it read drawn .* not other"):
        supervise.fit(others, recipe, state_file=state)
    with pytest.raises(data.DatasetError, match=r"another recipe \(rate 0.001 instead of 0.1\)"):
        supervise.fit(samples, replace(recipe, rate=0.1), state_file=state)


def test_a_run_starts_from_anothers_weights(dataset: Path, tmp_path: Path) -> None:
    samples, first = data.read(dataset, "train"), tmp_path / "first.pt"
    recipe = replace(RECIPE, hours=2 / 3600, batch=8, threads=1)
    # Of another seed: however few steps there are time for, its weights are others.
    average, begun = supervise.fit(samples, replace(recipe, seed=1), state_file=first)
    still = replace(recipe, hours=1e-9)  # one step at the warm-up's first rate
    others = [replace(s, source="other", licence="CC-BY-NC-4.0") for s in samples]
    state = tmp_path / "second.pt"
    again, history = supervise.fit(others, still, state_file=state, start=first)
    fresh, _ = supervise.fit(samples, still)
    assert torch.allclose(again.head.weight, average.head.weight, atol=1e-3)
    assert not torch.allclose(fresh.head.weight, average.head.weight, atol=1e-3)
    # What the first run saw is told by the second, resumed without naming it as well.
    assert history.saw == [("drawn", "CC0-1.0"), ("other", "CC-BY-NC-4.0")]
    _, resumed = supervise.fit(others, still, state_file=state)
    assert resumed.start == begun
    assert resumed.document()["started_from"]["steps"] == begun.steps
    with pytest.raises(data.DatasetError, match=r"began from first\.pt .*, not from second\.pt"):
        supervise.fit(others, still, state_file=state, start=state)


@pytest.mark.parametrize("content", [b"", b"PK", b"text", b"\x80\x02]q\x00."])
def test_a_file_that_is_no_state_is_one_line(dataset: Path, tmp_path: Path, content: bytes) -> None:
    samples, file = data.read(dataset, "train"), tmp_path / "state.pt"
    file.write_bytes(content)
    for files in ({"start": file}, {"state_file": file}):
        with pytest.raises(data.DatasetError, match="cannot be used as a state") as caught:
            supervise.fit(samples, RECIPE, **files)
        assert "\n" not in str(caught.value)
    torch.save({"average": {}}, file)  # a state that does not say what it saw
    with pytest.raises(data.DatasetError, match="history"):
        supervise.fit(samples, RECIPE, start=file)


def test_features_are_what_the_last_layer_sees() -> None:
    model = classifier.build(RECIPE).eval()
    images = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    features = classifier.features_of(model, images)
    assert features.shape == (3, 160)
    last = model.get_classifier()
    expected = features @ last.weight.detach().double().numpy().T + last.bias.detach().numpy()
    assert np.allclose(classifier.logits_of(model, images), expected, atol=1e-4)


def test_a_folder_that_is_no_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(data.DatasetError, match=r"holds no classifier.*python -m training\.vit"):
        classifier.load(tmp_path)


def test_calibration_undoes_overconfidence_and_a_wrong_prior() -> None:
    random = np.random.default_rng(0)
    honest = random.normal(-1, 1.5, 4000)
    labels = (random.random(4000) < 1 / (1 + np.exp(-honest))).astype(np.int64)
    logits = np.stack([np.zeros(4000), 3 * (honest + 1.2)], axis=1)
    scale, shift = scores.platt(logits, labels)
    assert scale == pytest.approx(3, rel=0.1)
    assert shift == pytest.approx(-3.6, rel=0.1)
    before, after = (
        scores.probabilities(logits, 1.0),
        scores.probabilities(logits + [0, shift], scale),
    )
    assert scores.calibration_error(after, labels) < scores.calibration_error(before, labels) / 4


def test_a_shift_is_a_shift_of_one_logit() -> None:
    model = classifier.build(RECIPE).eval()
    images = np.zeros((1, 128, 128, 3), np.uint8)
    before = classifier.logits_of(model, images)
    classifier.shift_logit(model, -1.5)
    assert np.allclose(classifier.logits_of(model, images) - before, [[0, -1.5]], atol=1e-5)


def test_threshold_keeps_the_sensitivity_and_the_band_the_coverage() -> None:
    random = np.random.default_rng(1)
    labels = (random.random(1000) < 0.3).astype(np.int64)
    logits = np.stack([np.zeros(1000), random.normal(2.0 * labels - 1, 1.5)], axis=1)
    calibration = scores.calibrate(logits, labels, 1.0, RECIPE)
    p = scores.probabilities(logits, 1.0)
    assert np.mean(p[labels == 1] >= calibration["threshold"]) >= RECIPE.sensitivity
    assert calibration["validation"]["sensitivity"] >= RECIPE.sensitivity
    low, high = calibration["abstain"]
    assert low <= calibration["threshold"] <= high
    assert np.mean((p < low) | (p >= high)) == pytest.approx(RECIPE.coverage, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_written_threshold_keeps_the_lesion_that_it_was_set_by(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.arange(60) % 2
    logits = np.stack([np.zeros(60), random.normal(2.0 * labels - 1, 1.5)], axis=1)
    found = scores.calibrate(logits, labels, 0.86714, RECIPE)
    p = scores.probabilities(logits, found["temperature"])
    exact = np.quantile(p[labels == 1], 0.05, method="lower")
    assert exact - 1e-4 <= found["threshold"] <= exact
    assert np.mean(p[labels == 1] >= found["threshold"]) >= 0.95
    assert found["abstain"][0] <= found["threshold"] <= found["abstain"][1]


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1], []])
def test_one_class_has_no_auc(labels: list[int]) -> None:
    found = scores.auc(np.linspace(0, 1, len(labels)), np.array(labels, np.int64))
    assert (found["auc"], found["interval"], found["images"]) == (None, None, len(labels))
    assert found["note"]


def test_a_test_source_of_one_class_is_reported(dataset: Path) -> None:
    test = [
        replace(s, source="benign", confirmed="histo") if s.lesion.label == "benign" else s
        for s in data.read(dataset, "test")
    ]
    calibration = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6], "shift": 0.0}
    found = scores.report(lambda x: np.zeros((len(x), 2)), test, calibration, 32)
    assert found["benign"]["whole"]["auc"] is found["benign"]["sensitivity"] is None
    assert found["benign"]["histology"]["images"] == 3
    assert found["benign"]["lesion_masked"]["images"] == 0  # none has a mask
    json.dumps(found, allow_nan=False)


def test_what_is_scored_is_what_is_written(tmp_path: Path) -> None:
    model = classifier.build(RECIPE).eval()
    images = np.random.default_rng(0).integers(0, 255, (3, 128, 128, 3), dtype=np.uint8)
    exact = classifier.logits_of(model, images)
    classifier.as_shipped(model)
    logits = classifier.logits_of(model, images)
    assert not np.array_equal(exact, logits)
    history = states.History("x", ())
    calibration = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6]}
    classifier.save(model, RECIPE, calibration, {}, history, tmp_path)
    assert np.array_equal(classifier.logits_of(classifier.load(tmp_path), images), logits)


def test_controls_hide_what_they_say() -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    border = scores.border_only(images)
    assert np.array_equal(border[:, :6], images[:, :6])
    assert np.ptp(border[:, 6:-6, 6:-6], axis=(1, 2)).max() == 0
    images[:, 20:40, 20:40] = 0
    assert np.array_equal(scores.border_only(images), border)


def test_it_learns_and_timm_opens_the_result(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classifier"
    budget = ["--steps", "40", "--batch", "16", "--size", "64", "--threads", "1",
              "--precision", "fp32", "--optimizer", "adamw"]  # fmt: skip
    status = vit.main(["--data", str(dataset), "--out", str(out), *budget])
    assert status == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["test"]["drawn"]["whole"]["auc"] == 1.0  # large dark against small pale blobs
    config = json.loads((out / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=2, **config["model_args"], pretrained=False
    )
    model.load_state_dict(load_file(out / "model.safetensors"))
    images = data.load_images(data.read(dataset, "test"), 64)
    model.pretrained_cfg = config["pretrained_cfg"]
    logits = classifier.logits_of(model.eval(), images)
    assert torch.tensor(logits).isfinite().all()
    assert np.array_equal(classifier.logits_of(classifier.load(out), images), logits)
    assert json.loads((out / "report.json").read_text())["saw"][0]["licence"] == "CC0-1.0"


def test_a_test_on_what_was_learnt_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A learnt picture, turned and recompressed, in the test split."""
    folder = shutil.copytree(dataset, tmp_path / "leaking")
    with Image.open(folder / "000.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(folder / "copy.jpg")
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "copy.jpg", "label": "benign", "split": "test"}\n')
    arguments = ["--data", str(folder), "--out", str(tmp_path / "o"), "--hours", "0.0001"]
    assert vit.main(arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 7 test pictures were seen by this training" in said
    assert f"{folder}/copy.jpg = {folder}/000.png" in said
    assert "--leave-out" in said
    assert not (tmp_path / "o").exists()
    learnt: list[data.Sample] = []
    monkeypatch.setattr(
        vit.supervise,
        "fit",
        lambda samples, *_, **__: learnt.extend(samples) or pytest.exit("trained"),
    )
    seen = tmp_path / "seen.npz"
    with pytest.raises(pytest.exit.Exception):
        vit.main([*arguments, "--leave-out", "--seen", str(seen)])
    assert len(learnt) == 7
    assert folder / "000.png" not in {sample.file for sample in learnt}
    assert len(thumbnails.Index.load(seen)) == 7 + 6


def test_a_missing_split_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "benign"}\n')
    assert vit.main(["--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no sample in split val, test" in capsys.readouterr().err


def _refused(options: list[str], capsys: pytest.CaptureFixture[str],
             monkeypatch: pytest.MonkeyPatch) -> str:  # fmt: skip
    """What is printed of a run that is refused before it trains."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(supervise, "fit", never)
    assert vit.main(options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_what_would_fail_after_the_training_is_refused_before(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refused(folder: Path, *options: str) -> str:
        given = ["--data", str(folder), "--out", str(tmp_path / "out"), *options]
        return _refused(given, capsys, monkeypatch)

    file = dataset / "metadata.jsonl"
    assert "is a file; give a folder" in refused(dataset, "--out", str(file))
    assert "is a folder; give a file" in refused(dataset, "--work", str(tmp_path))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changed = tmp_path / "changed"
    changed.mkdir()
    one_class = [r for r in rows if r["split"] != "val" or r["label"] == "benign"]
    (changed / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in one_class))
    assert "split val has no malignant lesion among its 3" in refused(changed)
    (changed / "metadata.jsonl").write_text(file.read_text())  # of pictures that are elsewhere
    assert "cannot be read as a picture" in refused(changed)
    with pytest.raises(SystemExit):
        refused(dataset, "--threads", "0")
    assert "is not a whole number above 0" in capsys.readouterr().err
