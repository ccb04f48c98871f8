"""Plots: what is drawn, of which size, under which name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import evaluation, plots
from training.raw_scores import RawScores, decisions, probabilities

CALIBRATION: dict[str, Any] = {
    "temperature": 1.0, "threshold": 0.3, "abstain": [0.2, 0.4], "shift": 0.3,
}  # fmt: skip


def _raw(source: str, count: int = 80) -> RawScores:
    random = np.random.default_rng(0)
    labels = (np.arange(count) % 2).astype(np.int64)
    logits = np.stack([np.zeros(count), random.normal(2.0 * labels - 1)], axis=1)
    p, empty = probabilities(logits, 1.0), np.full(count, "")
    return RawScores(
        file=np.arange(count).astype(str), group=np.arange(count).astype(str),
        source=np.full(count, source),
        confirmed=np.where(np.arange(count) % 3, "histo", "follow_up"),
        split=np.full(count, "test"), label=labels, diagnosis=empty, age=np.full(count, np.nan),
        sex=empty, site=empty, skin_type=empty, logit_benign=logits[:, 0],
        logit_malignant=logits[:, 1], probability=p, decision=decisions(p, CALIBRATION),
        border_only=random.normal(size=count), lesion_masked=np.full(count, np.nan),
    )  # fmt: skip


def _saved(folder: Path, raw: RawScores) -> list[Path]:
    return plots.save(folder, raw, evaluation.figures(raw, CALIBRATION, 20), CALIBRATION)


def _has(picture: Path, colour: str) -> bool:
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels.astype(int) - wanted).max(-1) < 6).sum() > 50)


def test_curves_and_their_threshold_are_drawn(tmp_path: Path) -> None:
    written = _saved(tmp_path, _raw("ISIC 2017 challenge (Archive)"))
    names = ["roc_isic_2017_challenge.png", "reliability_isic_2017_challenge.png"]
    assert [file.name for file in written] == names
    for file in written:
        with Image.open(file) as picture:
            assert (picture.format, picture.width) == ("PNG", 1200)
            assert picture.height >= 1200
        assert _has(file, plots._BLUE)
    roc, reliability = written
    assert _has(roc, plots._RED)
    assert _has(roc, plots._GREY)
    assert not _has(roc, plots._GREEN)  # nothing was painted over
    assert _has(reliability, plots._GREEN)  # the threshold


def test_plots_of_a_source_that_went_are_removed(tmp_path: Path) -> None:
    _saved(tmp_path, _raw("old"))
    (tmp_path / "notes.txt").write_text("mine")
    _saved(tmp_path, _raw("new $x_1^$"))  # no formula
    assert {file.name for file in tmp_path.iterdir()} == {
        "notes.txt", "roc_new_x_1.png", "reliability_new_x_1.png"
    }  # fmt: skip


def test_one_class_has_no_roc_curve(tmp_path: Path) -> None:
    raw = _raw("benign")
    written = _saved(tmp_path, raw.where(raw.label == 0))
    assert [file.name for file in written] == ["reliability_benign.png"]


def test_scores_that_are_no_numbers_have_no_plots(tmp_path: Path) -> None:
    raw = _raw("diverged")
    nothing = np.full(len(raw), np.nan)
    assert _saved(tmp_path, replace(raw, logit_malignant=nothing, probability=nothing)) == []


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["HAM10000 (Vienna), 2018", "HAM10000 (again)", "HAM10000"],
         ["ham10000", "ham10000_2", "ham10000_3"]),
        (["", "(x)", "日本"], ["source", "source_2", "source_3"]),
        (["../../etc/passwd"], ["etc_passwd"]),
        (["a", "a_2", "a"], ["a", "a_2", "a_3"]),
        (["a_2", "a", "a"], ["a_2", "a", "a_3"]),
    ],
)  # fmt: skip
def test_files_have_names_of_their_own(sources: list[str], names: list[str]) -> None:
    assert plots.names(sources) == names
