from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from dermaflux.prompt import Lesion
from training import data, vit

RECIPE = vit.Recipe()


def _sample(label: str, source: str = "a", confirmed: str = "") -> data.Sample:
    return data.Sample(Path("x"), Lesion(label), "train", "g", source, "CC0-1.0", confirmed)


def test_half_of_all_draws_are_malignant() -> None:
    samples = (
        [_sample("benign", "a")] * 90 + [_sample("benign", "b", "follow_up")] * 900
        + [_sample("malignant", "a")] * 10 + [_sample("malignant", "b", "histo")] * 200
    )  # fmt: skip
    weights = vit.draw_weights(samples).numpy()
    malignant = np.array([s.lesion.label == "malignant" for s in samples])
    assert weights[malignant].sum() == pytest.approx(weights[~malignant].sum())
    small, large = weights[0] * 90, weights[90] * 900
    assert large / small == pytest.approx((900 / 90) ** 0.5)


def test_calibration_undoes_overconfidence_and_a_wrong_prior() -> None:
    random = np.random.default_rng(0)
    honest = random.normal(-1, 1.5, 4000)
    labels = (random.random(4000) < 1 / (1 + np.exp(-honest))).astype(np.int64)
    logits = np.stack([np.zeros(4000), 3 * (honest + 1.2)], axis=1)
    scale, shift = vit.platt(logits, labels)
    assert scale == pytest.approx(3, rel=0.1)
    assert shift == pytest.approx(-3.6, rel=0.1)
    before, after = vit.probabilities(logits, 1.0), vit.probabilities(logits + [0, shift], scale)
    assert vit.calibration_error(after, labels) < vit.calibration_error(before, labels) / 4


def test_a_shift_is_a_shift_of_one_logit() -> None:
    model = vit.build(RECIPE).eval()
    images = np.zeros((1, 128, 128, 3), np.uint8)
    before = vit.logits_of(model, images)
    vit.shift_logit(model, -1.5)
    assert np.allclose(vit.logits_of(model, images) - before, [[0, -1.5]], atol=1e-5)


def test_threshold_keeps_the_sensitivity_and_the_band_the_coverage() -> None:
    random = np.random.default_rng(1)
    labels = (random.random(1000) < 0.3).astype(np.int64)
    logits = np.stack([np.zeros(1000), random.normal(2.0 * labels - 1, 1.5)], axis=1)
    calibration = vit.calibrate(logits, labels, 1.0, RECIPE)
    p = vit.probabilities(logits, 1.0)
    assert np.mean(p[labels == 1] >= calibration["threshold"]) >= RECIPE.sensitivity - 0.01
    low, high = calibration["abstain"]
    assert low <= calibration["threshold"] <= high
    assert np.mean((p < low) | (p >= high)) == pytest.approx(RECIPE.coverage, abs=0.02)


def test_controls_hide_what_they_say() -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    border = vit.border_only(images)
    assert np.array_equal(border[:, :6], images[:, :6])
    assert np.ptp(border[:, 6:-6, 6:-6], axis=(1, 2)).max() == 0
    images[:, 20:40, 20:40] = 0
    assert np.array_equal(vit.border_only(images), border)


def test_it_learns_and_timm_opens_the_result(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classifier"
    status = vit.main(["--data", str(dataset), "--out", str(out), "--hours", str(20 / 3600)])
    assert status == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["test"]["drawn"]["whole"]["auc"] == 1.0  # large dark against small pale blobs
    config = json.loads((out / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=2, **config["model_args"], pretrained=False
    )
    model.load_state_dict(load_file(out / "model.safetensors"))
    images = data.load_images(data.read(dataset, "test"), 128)
    logits = vit.logits_of(model.eval(), images)
    assert torch.tensor(logits).isfinite().all()
    assert json.loads((out / "report.json").read_text())["saw"][0]["licence"] == "CC0-1.0"


def test_a_missing_split_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "benign"}\n')
    assert vit.main(["--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "no sample in split val, test" in capsys.readouterr().err
