"""Which real and synthetic pictures are learnt."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from dermaflux.prompt import Lesion
from training import mixing
from training.data import DatasetError, Sample


def _samples(benign: int, malignant: int, source: str = "real", of_group: int = 1) -> list[Sample]:
    labels = ["benign"] * benign + ["malignant"] * malignant
    return [
        Sample(Path(f"{source}/{number}.png"), Lesion(label), "train",
               f"{label}{number // of_group}", source, "CC0-1.0")
        for number, label in enumerate(labels)
    ]  # fmt: skip


def _labels(samples: list[Sample]) -> Counter[str]:
    return Counter(str(sample.lesion.label) for sample in samples)


def test_smaller_choices_are_within_larger_ones_and_labels_are_shared_out() -> None:
    real = _samples(810, 190)
    before: set[Path] = set()
    for count in (50, 100, 101, 102, 250, 500, 1000):
        chosen = mixing.limited(real, count, seed=3)
        assert len(chosen) == count
        assert abs(_labels(chosen)["malignant"] - 0.19 * count) <= 0.5
        files = {sample.file for sample in chosen}
        assert before < files
        before = files
    assert {s.file for s in mixing.limited(real, 50, 4)} != {
        s.file for s in mixing.limited(real, 50, 3)
    }


def test_groups_are_taken_whole() -> None:
    real = _samples(90, 60, of_group=7)
    sizes = Counter(sample.group for sample in real)
    before: set[Path] = set()
    for count in range(20, 150, 3):
        chosen = mixing.limited(real, count, seed=0)
        assert count - 2 * 7 < len(chosen) <= count
        assert all(sizes[g] == n for g, n in Counter(s.group for s in chosen).items())
        files = {sample.file for sample in chosen}
        assert before <= files
        before = files


def test_a_limit_that_cannot_be_is_said() -> None:
    with pytest.raises(DatasetError, match="--limit 11 is more than the 10 real"):
        mixing.limited(_samples(8, 2), 11, 0)
    with pytest.raises(DatasetError, match="leaves no malignant lesion"):
        mixing.limited(_samples(98, 2), 10, 0)


def test_a_ratio_takes_labels_as_the_real_ones_have_them_or_by_half() -> None:
    real, pool = _samples(80, 20), _samples(300, 300, "made")
    before: set[Path] = set()
    for ratio in (0.5, 1.0, 1.25, 1.75, 3.0):
        chosen = mixing.synthetic(pool, real, ratio, seed=1)
        assert _labels(chosen) == {"benign": 80 * ratio, "malignant": 20 * ratio}
        files = {sample.file for sample in chosen}
        assert before < files
        before = files
    half = mixing.synthetic(pool, real, 1.75, seed=1, by="label")
    assert abs(_labels(half)["benign"] - _labels(half)["malignant"]) <= 1
    assert len(half) == 175


def test_too_few_synthetic_pictures_are_counted() -> None:
    with pytest.raises(
        DatasetError, match="needs 35 synthetic malignant lesions, and there are 34; make more"
    ):
        mixing.synthetic(_samples(300, 34, "made"), _samples(80, 20), 1.75, 0)


def test_synthetic_pictures_are_for_training_alone(caplog: pytest.LogCaptureFixture) -> None:
    real, made = _samples(4, 4), _samples(3, 3, "made")
    pool = [made[0], replace(made[1], split="val"), replace(made[2], split="test")]
    with caplog.at_level(logging.INFO):
        assert mixing.only_training(pool, real) == [made[0]]
    assert "2 synthetic pictures of other splits" in caplog.text
    assert mixing.only_training([], real) == []
    with pytest.raises(DatasetError, match="no synthetic picture is in the split train"):
        mixing.only_training(pool[1:], real)
    with pytest.raises(DatasetError, match="is given as --data and as --synthetic"):
        mixing.only_training([real[0]], real)
    with pytest.raises(DatasetError, match=r"made/1\.png and 1 more of --data are generated"):
        mixing.only_training([], [*real, *(replace(s, confirmed="synthetic") for s in made[1:3])])
