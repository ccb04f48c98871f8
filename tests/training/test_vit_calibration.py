"""Calibration where validation shows nothing, or everything."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from training import scores
from training.recipe import Recipe

Floats = NDArray[np.float64]


def _logits(difference: Floats) -> Floats:
    return np.stack([np.zeros(len(difference)), difference], axis=1)


def _calibrated(difference: Floats, labels: NDArray[np.int64]) -> tuple[float, Floats]:
    scale, shift = scores.platt(_logits(difference), labels)
    return scale, scores.probabilities(_logits(difference + shift), scale)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_without_signal_the_mean_probability_is_the_prevalence(
    sign: float, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    labels = (np.arange(400) % 5 == 0).astype(np.int64)
    difference = sign * (labels + random.normal(0, 3, 400)) + 50.1
    scale, p = _calibrated(difference, labels)
    assert scale == pytest.approx((difference.std() if sign else 1) / 0.05)
    assert p.mean() == pytest.approx(0.2, abs=1e-6)
    assert "validation shows no signal" in caplog.text


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_parted_classes_have_the_probabilities_of_platts_targets(
    size: float, caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.repeat([0, 1], [30, 10])
    difference = size * (np.where(labels, 1.0, -1.0) + 7)
    scale, p = _calibrated(difference, labels)
    assert p[labels == 1] == pytest.approx(11 / 12, abs=1e-3)
    assert p[labels == 0] == pytest.approx(1 / 32, abs=1e-3)
    assert not caplog.text
    written = scores.calibrate(_logits(difference), labels, scale, Recipe())["temperature"]
    assert written == pytest.approx(scale, rel=1e-4)
    assert written > 0


def test_digits_that_are_kept_say_something() -> None:
    assert scores.significant(0.0000123456789) == 0.000012346
    assert scores.significant(-3.14159265) == -3.1416
    assert scores.significant(0.0) == 0.0
