"""Conformal sets: the promise is kept on average over splits, in each class."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dermaflux.errors import DatasetError
from training import conformal
from training.figures import Floats
from training.roc import Labels


def _drawn(random: np.random.Generator, count: int) -> tuple[Floats, Labels]:
    labels = (random.random(count) < 0.2).astype(np.int64)
    return 1 / (1 + np.exp(-random.normal(2 * labels - 2))), labels


@pytest.mark.parametrize(
    ("count", "alpha", "rank"), [(9, 0.1, 9), (19, 0.05, 19), (99, 0.1, 90), (100, 0.1, 91)]
)
def test_the_quantile_is_that_of_a_finite_sample(count: int, alpha: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert conformal.quantile(scores, alpha) == rank
    assert conformal.quantile(scores[: math.ceil(1 / alpha) - 2], alpha) == math.inf


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_each_class_is_covered_as_promised(alpha: float) -> None:
    random = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        p, labels = _drawn(random, 700)
        fitted = conformal.fit(p[:200], labels[:200], alpha)
        found = conformal.figures(conformal.sets(p[200:], fitted), labels[200:])
        rows.append([found["coverage_benign"][0], found["coverage_malignant"][0]])
    benign, malignant = np.mean(rows, axis=0)
    assert benign == pytest.approx(1 - alpha, abs=0.012)
    # At least that, and at most 1 / (n + 1) more: about forty are malignant.
    assert 1 - alpha - 0.01 < malignant < 1 - alpha + 1 / 35 + 0.01


def test_the_shares_are_of_what_the_sets_hold() -> None:
    inside = np.array([[1, 0], [1, 0], [0, 1], [1, 1], [0, 0]], bool)
    labels = np.array([0, 1, 1, 0, 1])
    found = {name: float(v[0]) for name, v in conformal.figures(inside, labels).items()}
    assert tuple(found) == conformal.NAMES
    assert found == pytest.approx({
        "coverage": 3 / 5, "coverage_benign": 1, "coverage_malignant": 1 / 3, "mean_size": 1,
        "only_benign": 2 / 5, "only_malignant": 1 / 5, "both": 1 / 5, "none": 1 / 5,
    })  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_rounding_never_takes_a_label_away(seed: int) -> None:
    p, labels = _drawn(np.random.default_rng(seed), 150)
    fitted = conformal.fit(p, labels, 0.1)
    held = conformal.figures(conformal.sets(p, fitted), labels)
    for name in ("coverage_benign", "coverage_malignant"):
        assert held[name][0] >= 0.9


def test_a_class_too_small_is_in_every_set() -> None:
    p, labels = np.linspace(0.01, 0.99, 50), np.array([0] * 42 + [1] * 8)
    fitted = conformal.fit(p, labels, 0.1)
    assert fitted["malignant_from"] == 0
    assert fitted["note"] == "8 malignant are fewer than 9: in every set"
    assert conformal.sets(np.array([0.0, 1.0]), fitted)[:, 1].all()
    assert "note" not in conformal.fit(p, np.array([0] * 41 + [1] * 9), 0.1)


def test_limits_are_of_the_pictures_given_alone() -> None:
    p, labels = _drawn(np.random.default_rng(1), 400)
    fitted = conformal.fit(p, labels)
    own = np.sort(p[labels == 0])
    rank = math.ceil((len(own) + 1) * 0.9)
    assert own[rank - 1] <= fitted["benign_up_to"] < own[rank - 1] + 1e-4
    own = np.sort(p[labels == 1])[::-1]
    rank = math.ceil((len(own) + 1) * 0.9)
    assert own[rank - 1] - 1e-4 < fitted["malignant_from"] <= own[rank - 1]
    assert fitted["calibrated_on"] == {"benign": 400 - len(own), "malignant": len(own)}


def test_what_gives_no_promise_is_refused() -> None:
    p, labels = _drawn(np.random.default_rng(1), 50)
    for alpha in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(DatasetError, match="is no share of errors"):
            conformal.fit(p, labels, alpha)
    p[0] = np.nan
    with pytest.raises(DatasetError, match="diverged"):
        conformal.fit(p, labels)
