"""The measure of an export, and what happens to one that is too far away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dermaflux.engines.fake import Fake
from export.parity import (
    EQUAL_DB,
    Case,
    ParityError,
    Recorder,
    Row,
    image_parity,
    image_rows,
    part_parity,
    psnr,
    require,
    roc_auc,
    ssim,
    thinned,
)

FLAT = np.full((4, 4, 3), 100, dtype=np.uint8)


def _doubled(error: float = 0.0) -> Fake:
    return Fake(lambda inputs: {"y": 2 * inputs["x"] + np.float32(error)})


def test_psnr():
    assert psnr(FLAT, FLAT) == EQUAL_DB
    assert psnr(FLAT + np.uint8(1), FLAT) == pytest.approx(48.13, abs=0.01)
    # Bytes must not wrap around.
    assert psnr(FLAT, FLAT + np.uint8(155)) == pytest.approx(4.32, abs=0.01)


def test_parity_of_a_part_is_relative_to_its_largest_output():
    x = np.array([1.0, -4.0], dtype=np.float32)
    cases = [Case({"x": x}, {"y": 2 * x}), Case({"x": x / 2}, {"y": x})]
    found = part_parity(_doubled(0.5), cases, tolerance=0.1)
    assert found.max_abs == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.5 / 8)
    assert part_parity(_doubled(), cases, 0.1).relative == 0


@pytest.mark.parametrize("broken", [np.array([np.nan, 1.0]), np.array([1.0])])
def test_no_number_and_another_shape_are_beyond_any_tolerance(broken):
    engine = Fake(lambda inputs: {"y": broken})
    case = Case({}, {"y": np.array([1.0, 1.0])})
    found = part_parity(engine, [case], 0.1)
    assert not Row("part", "fp32", "fake", found.relative, 0.1, "").passed


def test_a_recorder_keeps_what_passes():
    recorder = Recorder(_doubled())
    one = np.ones(2, dtype=np.float32)
    assert recorder.run({"x": one})["y"].tolist() == [2, 2]
    recorder.bind({"x": one})({"z": 3 * one})
    assert [sorted(case.inputs) for case in recorder.cases] == [["x"], ["x", "z"]]
    assert (recorder.name, recorder.precision) == ("fake", "fp32")


def test_thinned_keeps_both_ends():
    cases = [Case({"step": np.array(step)}, {}) for step in range(20)]
    kept = [int(case.inputs["step"]) for case in thinned(cases, 5)]
    assert kept == [0, 5, 10, 14, 19]
    assert len(thinned(cases[:3], 5)) == 3


def _noisy(level: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, level, (16, 16, 3))
    return (100 + noise).round().astype(np.uint8)


def test_images_are_judged_by_median_and_worst():
    clean = [_noisy(0)] * 3
    found = image_parity([_noisy(1), _noisy(1.5), _noisy(3)], clean, steps=4, precision="int8")
    assert found.prompts == 3
    assert 36 < found.psnr_worst_db < 42 < found.psnr_median_db < 48
    assert found.ssim_worst < found.ssim_median < 1
    assert all(row.passed for row in image_rows(found, "int8", "fake"))
    broken = image_parity([_noisy(3), _noisy(3), _noisy(9)], clean, 4, "int8")
    assert not any(row.passed for row in image_rows(broken, "int8", "fake"))
    assert all(row.passed for row in image_rows(replace(broken, tolerance_db=30,
        tolerance_worst_db=20), "fp8", "fake"))  # fmt: skip


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    one, other = _noisy(20), _noisy(5)
    expected = metrics.structural_similarity(one, other, channel_axis=2, data_range=255)
    assert ssim(one, other) == pytest.approx(expected, abs=1e-6)
    assert ssim(one, one) == pytest.approx(1)


def test_the_area_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    scores, labels = random.integers(0, 9, 60) / 9, random.random(60) < 0.3
    assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))
    with pytest.raises(ParityError, match="both labels"):
        roc_auc([0.1, 0.2], [True, True])


def test_a_refusal_has_the_whole_table():
    good = Row("vae_decoder", "fp32", "one", 1e-6, 1e-4, "of the largest output")
    bad = Row("images, median", "int8", "two", 17.5, 30.0, "dB", at_least=True)
    require([good])
    with pytest.raises(ParityError) as refused:
        require([good, bad])
    message = str(refused.value)
    assert "1 of 2 comparisons" in message
    assert "FAIL images, median" in message
    assert "17.5 dB, needs at least 30" in message
    assert "vae_decoder" in message
    assert "Leave int8 out" in message


def test_no_number_is_no_pass():
    assert not Row("x", "fp32", "e", float("nan"), 1.0, "").passed
    assert not Row("x", "fp32", "e", float("nan"), 1.0, "dB", at_least=True).passed
