"""The report's statistics on arrays whose answer is known; nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training import data, figures, obedience, realism


def _random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_auc_of_known_orders() -> None:
    up, down = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    assert figures.auc(figures.comparison(up, down)) == 1
    assert figures.auc(figures.comparison(down, up)) == 0
    assert figures.auc(figures.comparison(up, up)) == 0.5


def test_auc_interval_holds_the_truth() -> None:
    random = _random()
    truth = 0.7602  # of two normals one deviation apart: Phi(1 / sqrt 2)
    wins = figures.comparison(random.normal(1, 1, 400), random.normal(0, 1, 400))
    counts = [figures.resampled(400, random) for _ in range(2)]
    low, high = figures.interval(figures.auc(wins, *counts))
    assert low < truth < high
    assert high - low < 0.1


def test_counts_stand_for_repeated_items() -> None:
    random = _random()
    x, y = random.normal(size=(5, 3)), random.normal(size=(4, 3))
    wins = figures.comparison(x[:, 0], y[:, 0])
    counts = np.array([[2.0, 0, 1, 1, 1]])
    repeated = figures.comparison(np.repeat(x[:, 0], [2, 0, 1, 1, 1]), y[:, 0])
    assert figures.auc(wins, counts, np.ones((1, 4))) == pytest.approx(figures.auc(repeated))
    picked = realism.kid(x, y, np.array([[0.0, 1, 1, 0, 1]]), np.ones((1, 4)))
    assert picked == pytest.approx(realism.kid(x[[1, 2, 4]], y))


def test_kid_of_equal_distributions_is_about_zero_and_grows_with_a_shift() -> None:
    random = _random()
    same = [
        realism.kid(random.normal(size=(100, 8)), random.normal(size=(100, 8)))[0]
        for _ in range(50)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / 50**0.5  # unbiased: negative as well
    base = random.normal(size=(300, 8))
    shifted = [realism.kid(random.normal(size=(300, 8)) + s, base)[0] for s in (0, 0.3, 0.6, 1.2)]
    assert shifted == sorted(shifted)
    assert shifted[1] > 5 * abs(shifted[0])


def test_kid_does_not_depend_on_the_units_of_features() -> None:
    random = _random()
    mine, test, rest = (random.normal(size=(60, 8)) + s for s in (0.5, 0, 0))
    scale = 10 ** random.normal(size=8)
    plain = realism.kid_figures(mine, test, rest)
    scaled = realism.kid_figures(mine * scale + 7, test * scale + 7, rest * scale + 7)
    assert scaled[0].value == pytest.approx(plain[0].value)
    assert plain[0].goal == pytest.approx(3 * (plain[1].value or 0))


def test_the_ratio_of_distances_has_an_interval_where_the_reference_is_clear_of_zero() -> None:
    random = _random()
    mine, test, far = (random.normal(size=(80, 8)) + s for s in (1.5, 0, 1))
    ratio = realism.kid_figures(mine, test, far)[-1]
    assert ratio.interval is not None
    assert ratio.value is not None
    assert ratio.interval[0] < ratio.value < ratio.interval[1]
    none = realism.kid_figures(mine, test, random.normal(size=(80, 8)))[-1]
    assert (none.key, none.value, none.interval) == ("kid.ratio", None, None)
    assert "error of 0" in none.note


@pytest.fixture(scope="module")
def pictures() -> figures.Pixels:
    return _random().integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)


def test_a_turned_copy_is_found(pictures: figures.Pixels) -> None:
    train, test = pictures[:30], pictures[30:45]
    copies = np.ascontiguousarray(np.rot90(train[:15, :, ::-1], axes=(1, 2)))
    copied, *_ = realism.single_figures("pixels", realism.thumbnails, copies, test, train)
    assert copied.value == pytest.approx(0, abs=1e-6)
    assert copied.met is False
    fresh, *_ = realism.single_figures("pixels", realism.thumbnails, pictures[45:], test, train)
    assert fresh.value == pytest.approx(1, abs=0.05)


def test_near_duplicates_are_counted(pictures: figures.Pixels) -> None:
    def share(drawn: figures.Pixels) -> float:
        *_, line = realism.single_figures(
            "pixels", realism.thumbnails, drawn, pictures[30:], pictures[20:30]
        )
        return line.beside["near duplicates, share"] or 0.0

    assert share(np.concatenate([pictures[:15], pictures[:15, ::-1]])) == 1
    assert share(pictures[:30]) < 0.5


def test_held_out_pictures_that_were_trained_on_are_said(pictures: figures.Pixels) -> None:
    line, *_ = realism.single_figures(
        "pixels", realism.thumbnails, pictures[:9], pictures[9:18], pictures[9:30]
    )
    assert line.value is None
    assert line.met is False
    assert "training split" in line.note


@pytest.mark.parametrize(
    ("value", "needs", "met"),
    [
        (0.84, "at least", False), (0.85, "at least", True), (0.85, "above", False),
        (0.86, "at most", False), (0.85, "at most", True), (None, "at least", False),
    ],
)  # fmt: skip
def test_a_missed_goal_says_so(value: float | None, needs: figures.Needs, met: bool) -> None:
    line = figures.Figure("black", "black, AUC", value, 64, goal=0.85, needs=needs)
    assert line.met is met
    assert line.document()["met"] is met
    assert ("**no**" in figures.table([line])) is not met


def test_a_figure_without_a_goal_is_neither_met_nor_missed() -> None:
    line = figures.Figure("blue gray", "blue gray, AUC", 0.6, 64)
    assert line.met is None
    assert figures.table([line]).splitlines()[-1] == "| blue gray, AUC | 0.6 | 64 |  |  |  |"


def test_pairs_differ_in_one_thing_alone(dataset: Path) -> None:
    lesions = obedience.bases(data.read(dataset, "test"), 9)
    assert len(lesions) == 9
    for name, attribute in obedience.ATTRIBUTES.items():
        sides = (attribute.present, attribute.absent)
        with_it, without = (obedience.prompts(lesions, obedience.ASKED[side]) for side in sides)
        for (present, seed), (absent, same) in zip(with_it, without, strict=True):
            assert seed == same
            if name == "size":
                assert present.replace("large in", "small in") == absent
            else:
                left_out = present.replace(f"{name} and ", "").replace(f" and {name}", "")
                assert left_out == absent != present
