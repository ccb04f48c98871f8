"""Intervals by lesion and paired differences: whether they hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from training import bootstrap, metrics
from training.figures import Floats
from training.roc import Labels


def _lesions(random: np.random.Generator, count: int, shots: int) -> tuple[Floats, Labels, Labels]:
    """`shots` nearly equal pictures of each lesion: scores, labels, groups."""
    labels = (random.random(count) < 0.4).astype(np.int64)
    scores = np.repeat(random.normal(labels), shots) + random.normal(0, 0.1, count * shots)
    return scores, np.repeat(labels, shots), np.repeat(np.arange(count), shots)


def _auc(scores: Floats, labels: Labels, groups: Labels, draws: int = 300) -> tuple[float, float]:
    entry = bootstrap.measured(lambda w: {"auc": metrics.auc(scores, labels, w)}, groups, draws)
    return entry["auc"]["interval"][0], entry["auc"]["interval"][1]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    truth = 0.7602  # of two normals one deviation apart: Phi(1 / sqrt 2)
    random = np.random.default_rng(0)
    by_lesion, by_picture, rounds = 0, 0, 120
    for _ in range(rounds):
        scores, labels, groups = _lesions(random, 80, 4)
        low, high = _auc(scores, labels, groups)
        by_lesion += low < truth < high
        low, high = _auc(scores, labels, np.arange(len(scores)))
        by_picture += low < truth < high
    assert by_lesion >= 0.88 * rounds
    assert by_picture < 0.8 * rounds  # pictures of one lesion are no new evidence


def test_whole_groups_are_drawn_and_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = np.array(["b", "a", "b", "c", "c", "c"])
    monkeypatch.setattr(bootstrap, "_CELLS", 60)  # ten draws at a time
    parts = list(bootstrap.drawn(groups, 25, seed=3))
    assert [len(part) for part in parts] == [10, 10, 5]
    drawn = np.concatenate(parts)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 3:] == drawn[:, 3:4]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()
    assert drawn.std(0).min() > 0


def test_the_same_seed_gives_the_same_interval() -> None:
    scores, labels, groups = _lesions(np.random.default_rng(1), 50, 2)
    again = [_auc(scores, labels, groups) for _ in range(2)]
    assert again[0] == again[1]


def test_what_cannot_be_measured_says_why() -> None:
    def measured(scores: Floats, labels: list[int], groups: list[int]) -> dict[str, object]:
        of = np.array(labels, np.int64)
        found = bootstrap.measured(
            lambda w: metrics.ranking(scores, of, w) | metrics.decided(scores > 9, of, w), groups
        )
        assert all(np.isfinite(v) for e in found.values() for v in e.values() if _number(v))
        return {name: entry.get("note") for name, entry in found.items()}

    def _number(value: object) -> bool:
        return isinstance(value, float)

    one_class = measured(np.arange(3.0), [0, 0, 0], [1, 2, 3])
    assert one_class["auc"] == "needs pictures of both classes"
    assert one_class["sensitivity"] == "no malignant picture"
    assert one_class["specificity"] is None
    assert "called alike" in str(measured(np.arange(4.0), [0, 1, 0, 1], [1, 2, 3, 4])["mcc"])
    assert "no interval" in str(measured(np.arange(4.0), [0, 1, 0, 1], [1, 1, 1, 1])["auc"])
    # Two of a hundred are malignant and of one lesion: a third of the draws has none.
    labels = [0] * 98 + [1] * 2
    few = bootstrap.measured(
        lambda w: {"auc": metrics.auc(np.arange(100.0), np.array(labels), w)},
        [*range(98), 98, 98],
    )
    assert few["auc"]["interval"] == [1, 1]
    rare = {"auc": np.array([0.7])}, {"auc": np.full(2000, np.nan)}
    scarce = bootstrap.measured(lambda w: rare[w is not None], [1, 2], 2000)
    assert scarce["auc"]["interval"] is None
    assert "0 of" in scarce["auc"]["note"]


def test_a_model_does_not_differ_from_itself() -> None:
    scores, labels, groups = _lesions(np.random.default_rng(2), 60, 2)
    found = bootstrap.difference(metrics.auc, scores, scores, labels, groups, 200)
    assert found == {"value": 0, "interval": [0, 0], "above_zero": 0.5}


def test_pairing_sees_what_apart_is_lost() -> None:
    random = np.random.default_rng(3)
    labels = (np.arange(200) % 2).astype(np.int64)
    first = random.normal(labels)
    second = first + random.normal(0, 0.15, 200) - 0.25 * labels
    groups = np.arange(200)
    found = bootstrap.difference(metrics.auc, first, second, labels, groups, 500)
    back = bootstrap.difference(metrics.auc, second, first, labels, groups, 500)
    low, high = found["interval"]
    assert 0 < low < found["value"] < high
    assert found["above_zero"] > 0.99
    assert (back["value"], back["interval"]) == (-found["value"], [-high, -low])
    spans = [_auc(scores, labels, groups) for scores in (first, second)]
    assert spans[0][0] < spans[1][1]  # apart, the two intervals overlap


def test_runs_are_a_matter_of_chance_as_well() -> None:
    random = np.random.default_rng(4)
    labels = (np.arange(300) % 2).astype(np.int64)
    better = np.array([0.2, -0.6, 0.9, 0.1, -0.2])  # what the runs' seeds did to them
    runs = random.normal(labels * (1 + better[:, None]))
    base = random.normal(np.broadcast_to(labels, (5, 300)) * 1.0)
    both, fixed = (
        bootstrap.difference(metrics.auc, runs, base, labels, np.arange(300), 400, draw_seeds=draw)
        for draw in (True, False)
    )
    assert both["value"] == fixed["value"]
    assert np.diff(both["interval"]) > 1.2 * np.diff(fixed["interval"])
    # As many runs are pairs: what shifts both by the same seed does not count.
    shifted = random.normal(labels * (1 + better[:, None]))
    paired, crossed = (
        bootstrap.difference(metrics.auc, runs, other, labels, np.arange(300), 400)["interval"]
        for other in (shifted, shifted[[2, 1, 4, 3, 0]])
    )
    assert np.diff(paired) < 0.8 * np.diff(crossed)
    unequal = bootstrap.difference(metrics.auc, runs, base[:2], labels, np.arange(300), 50)
    assert unequal["interval"][0] < unequal["value"] < unequal["interval"][1]


def test_a_difference_without_both_classes_is_none() -> None:
    found = bootstrap.difference(
        metrics.auc, np.ones(3), np.ones(3), np.zeros(3, np.int64), [1, 2, 3]
    )
    assert found["value"] is found["interval"] is found["above_zero"] is None
    assert "both classes" in found["note"]
