"""Figures on arrays whose answer is known, or that scikit-learn knows; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as known

from training import metrics, roc
from training.figures import Floats
from training.roc import Labels


def _drawn(seed: int, count: int = 200, ties: int | None = None) -> tuple[Floats, Labels, Floats]:
    """Scores, labels and the weights of three draws."""
    random = np.random.default_rng(seed)
    labels = (random.random(count) < 0.3).astype(np.int64)
    p = 1 / (1 + np.exp(-random.normal(1.5 * labels - 1)))
    return np.round(p, ties) if ties else p, labels, random.integers(0, 4, (3, count)).astype(float)


def _challenge(labels: Labels, scores: Floats, weights: Floats | None = None) -> float:
    """The ISIC 2024 metric as the challenge states it, by scikit-learn's scaled partial area."""
    scaled = known.roc_auc_score(1 - labels, -scores, max_fpr=0.2, sample_weight=weights)
    least = 0.5 * 0.2**2
    return float(least + (0.2 - least) * (scaled - 0.5) / 0.5)


@pytest.mark.parametrize("ties", [None, 1])
@pytest.mark.parametrize("seed", range(4))
def test_a_ranking_is_scikit_learns_in_every_draw(seed: int, ties: int | None) -> None:
    p, labels, weights = _drawn(seed, ties=ties)
    for draw, value in zip(weights, metrics.auc(p, labels, weights), strict=True):
        assert value == pytest.approx(known.roc_auc_score(labels, p, sample_weight=draw))
    for draw, value in zip(weights, metrics.pauc(p, labels, weights), strict=True):
        assert value == pytest.approx(_challenge(labels, p, draw))
    assert metrics.auc(p, labels)[0] == pytest.approx(known.roc_auc_score(labels, p))


@pytest.mark.parametrize("seed", range(3))
def test_figures_at_a_threshold_are_scikit_learns(seed: int) -> None:
    p, labels, weights = _drawn(seed)
    called = p >= 0.4
    pairs: list[tuple[metrics.Metric, Callable[..., float]]] = [
        (metrics.accuracy, known.accuracy_score),
        (metrics.balanced_accuracy, known.balanced_accuracy_score),
        (metrics.sensitivity, known.recall_score),
        (metrics.mcc, known.matthews_corrcoef),
        (metrics.f1, known.f1_score),
    ]
    for ours, theirs in pairs:
        for draw, value in zip(weights, ours(called, labels, weights), strict=True):
            assert value == pytest.approx(theirs(labels, called, sample_weight=draw))
    lost = known.recall_score(1 - labels, ~called)
    assert metrics.specificity(called, labels, None)[0] == pytest.approx(lost)


def test_figures_of_probabilities_are_scikit_learns() -> None:
    p, labels, weights = _drawn(0)
    for draw, brier, loss in zip(
        weights,
        metrics.brier(p, labels, weights),
        metrics.log_loss(p, labels, weights),
        strict=True,
    ):
        assert brier == pytest.approx(known.brier_score_loss(labels, p, sample_weight=draw))
        assert loss == pytest.approx(known.log_loss(labels, p, sample_weight=draw))
    assert metrics.log_loss(np.array([0.0]), np.array([1]))[0] == pytest.approx(36.04, abs=0.01)


def test_a_weight_is_a_repeated_picture() -> None:
    p, labels, _ = _drawn(1, 60, ties=1)
    often = np.random.default_rng(2).integers(0, 3, 60)
    again = np.repeat(np.arange(60), often)
    weights = often[None].astype(float)
    for figures in (metrics.ranking, metrics.expected):
        weighted, repeated = figures(p, labels, weights), figures(p[again], labels[again])
        for name in weighted:
            if name != "calibration_error":  # its bins are cut on the pictures as they are
                assert weighted[name] == pytest.approx(repeated[name]), name
    one = metrics.decided(p > 0.4, labels, weights)
    other = metrics.decided(p[again] > 0.4, labels[again])
    assert {k: v[0] for k, v in one.items()} == pytest.approx({k: v[0] for k, v in other.items()})


def test_operating_points_are_thresholds_that_somebody_can_set() -> None:
    labels = np.array([0] * 20 + [1] * 4)
    # One benign above all, one tied with a malignant; 95 % of 20 benign are 19.
    p = np.concatenate([np.linspace(0, 0.1, 18), [0.5, 0.9], [0.05, 0.5, 0.6, 0.7]])
    curve = roc.roc(p, labels)
    assert roc.sensitivity_at(curve, 0.95)[0] == 0.5  # at 0.6; at 0.5 two benign are called
    assert roc.sensitivity_at(curve, 0.90)[0] == 0.75
    assert roc.specificity_at(curve, 0.75)[0] == 0.9
    assert roc.specificity_at(curve, 0.76)[0] == pytest.approx(np.mean(p[:20] < 0.05))
    assert roc.sensitivity_at(curve, 1.0)[0] == 0  # calling nobody is a point as well
    for k, threshold in enumerate(curve.thresholds):
        assert curve.tpr[0, k] == np.mean(p[20:] >= threshold)
        assert curve.fpr[0, k] == np.mean(p[:20] >= threshold)


def test_the_order_of_a_file_does_not_count() -> None:
    p, labels, _ = _drawn(3, 40, ties=1)
    order = np.lexsort((labels, p))  # benign first among equals, and then last
    for rows in (order, order[::-1]):
        for name, value in metrics.ranking(p[rows], labels[rows]).items():
            assert value == pytest.approx(metrics.ranking(p, labels)[name]), name


@pytest.mark.parametrize(("share", "said"), [(0.05, 140), (0.05, 180), (0.1, 30)])
def test_a_share_that_no_float_holds_is_still_met(share: float, said: int) -> None:
    labels = np.array([0] * said + [1] * 10)
    above = round(said * share)
    p = np.concatenate([np.full(above, 0.9), np.zeros(said - above), np.full(10, 0.5)])
    assert roc.sensitivity_at(roc.roc(p, labels), 1 - share)[0] == 1


def test_known_rankings() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    perfect = metrics.ranking(np.arange(5.0), labels)
    assert [float(v[0]) for v in perfect.values()] == pytest.approx([1, 0.2, 1, 1])
    worst = metrics.ranking(-np.arange(5.0), labels)
    assert [float(v[0]) for v in worst.values()] == [0, 0, 0, 0]
    equal = metrics.ranking(np.ones(5), labels)
    assert float(equal["auc"][0]) == 0.5
    assert float(equal["pauc"][0]) == pytest.approx(0.02)


def test_calibration_error_of_known_bins() -> None:
    p = np.repeat([0.1, 0.6], 50)
    labels = np.concatenate([np.arange(50) < 5, np.arange(50) < 40]).astype(np.int64)
    assert metrics.calibration_error(p, labels)[0] == pytest.approx((0 + 0.2) / 2)
    weights = np.repeat([[3.0, 1.0], [0.0, 2.0]], 50, axis=1)
    assert metrics.calibration_error(p, labels, weights) == pytest.approx([0.2 / 4, 0.2])
    random = np.random.default_rng(0)
    honest = random.random(20_000)
    drawn = (random.random(20_000) < honest).astype(np.int64)
    assert metrics.calibration_error(honest, drawn)[0] < 0.02
    assert metrics.calibration_error(honest**2, drawn)[0] == pytest.approx(1 / 6, abs=0.02)


def test_bins_hold_as_many_pictures_and_equal_ones_share() -> None:
    p = np.random.default_rng(0).random(150)
    assert set(np.bincount(metrics.binned(p), minlength=15)) == {10}
    p[:60] = 0.5
    assert len(set(metrics.binned(p)[:60])) == 1


@pytest.mark.parametrize("labels", [[], [0, 0], [1]])
def test_what_is_not_defined_is_nan_and_no_crash(labels: list[int]) -> None:
    p, of = np.linspace(0.1, 0.9, len(labels)), np.array(labels, np.int64)
    with np.errstate(all="raise"):
        assert all(np.isnan(v[0]) for v in metrics.ranking(p, of).values())
        decided = metrics.decided(p > 0.5, of)
        expected = metrics.expected(p, of)
    assert np.isnan(decided["mcc"][0])
    assert np.isnan(decided["accuracy"][0]) == np.isnan(expected["brier"][0]) == (not labels)


def test_a_score_that_is_no_number_has_no_figures() -> None:
    p, labels, _ = _drawn(0)
    p[3] = np.nan
    assert all(np.isnan(v[0]) for v in metrics.ranking(p, labels).values())
    assert all(np.isnan(v[0]) for v in metrics.expected(p, labels).values())
