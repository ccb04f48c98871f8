from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermaflux import files
from dermaflux.errors import DatasetError
from training import paper
from training.experiment import journal, raw, report, tables
from training.experiment.key import Key
from training.experiment.raw import Scores
from training.experiment.results import Results, View
from training.experiment.run import ABOUT

N = 40
RECIPE = {
    "architecture": "vit", "model_args": {}, "size": 16, "steps": 4, "batch": 8, "rate": 0.001,
    "optimizer": "muon",
}  # fmt: skip


def scores(skill: float, seed: int) -> Scores:
    """Of 40 test and 20 validation pictures, better separated the larger `skill`."""
    random = np.random.default_rng(seed)
    total = N + 20
    label = np.arange(total) % 2
    logits = np.stack([-skill * label, skill * label], 1) + random.normal(size=(total, 2))
    part = np.array(["test"] * N + ["val"] * 20)
    confirmed = np.where(np.arange(total) % 4 < 2, "histo", "follow_up")
    names = np.array([f"real/{n}.png" for n in range(total)])
    border = np.where(part == "test", random.normal(size=total), np.nan)
    return Scores(part, names, names, confirmed, label, logits, border, border)


def invented(
    folder: Path, skills: dict[tuple[str, str, int, float], float], seeds: int = 3
) -> Path:
    """Runs whose cells (arm, generator, size, ratio) are as good as is said."""
    (folder / "scores").mkdir(parents=True)
    with journal.Journal(folder) as book:
        for (arm, generator, size, ratio), skill in skills.items():
            for seed in range(seeds):
                key = Key(arm, generator, "model", size, ratio, seed)
                content = scores(skill, seed).bytes()
                files.write(folder / "scores" / f"{key.file}.npz", content)
                book.append(
                    {
                        "key": key.document(), "settings": {"recipe": RECIPE, "pretrained": None},
                        "seconds": 36.0, "cpu_seconds": 18.0, "gpu_seconds": 0.0,
                        "scores": f"scores/{key.file}.npz",
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                )  # fmt: skip
    about = {
        "config": {"generators": {"mini": {"cpu_hours": 2.5, "gpu_hours": None}, "small": {}}},
        "val_copies": 2, "tests": {"test": N + 2}, "same_as_real": {"small": 4},
        "left_out": {
            "test": [{"file": "real/x.png", "by": "generator mini", "seen": "a/b.png", "why": "w"}]
        },
        "generators": {
            "mini": {"pictures": 9, "sources": [["ISIC", "CC0-1.0"]], "labelled": 8, "made": 7,
                     "unknown": 1, "in_subset": {}, "bundle": {"name": "flux", "id": "f1"}},
            "small": {"pictures": 4, "sources": [], "labelled": 4, "made": 7, "unknown": 0,
                      "in_subset": {"4": 4}},
        },
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


GRID = {
    ("real", "", 4, 0.0): 0.5, ("added", "mini", 4, 1.0): 3.0, ("added", "mini", 4, 2.0): 0.5,
    ("real", "", 8, 0.0): 2.5, ("added", "mini", 8, 1.0): 0.0,
    ("classic", "", 8, 0.0): 2.5, ("upper", "mini", 9, 0.0): 3.0,
}  # fmt: skip


def said(folder: Path, tmp_path: Path, draws: int = 200) -> str:
    report.write(folder, tmp_path / "report.md", draws)
    return (tmp_path / "report.md").read_text()


def test_sentences_follow_the_numbers_whichever_way_they_are(tmp_path: Path) -> None:
    text = said(invented(tmp_path / "runs", GRID), tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("- With")]

    def one(size: int, what: str) -> str:
        (found,) = [line for line in lines if f"With {size} real" in line and what in line]
        return found

    assert one(4, "adding as many").endswith("a gain is shown.")
    assert one(8, "adding as many").endswith("a loss is shown.")
    assert one(4, "adding 2 times").endswith("no gain is shown, nor a loss.")
    assert "changed AUC on the test by 0.000 (95 % interval 0.000 to 0.000" in one(
        8, "stronger classic augmentation"
    )
    assert one(4, "all real pictures that mini saw").endswith("a gain is shown.")
    assert "Of 3 comparisons" in text
    assert "1 shows a gain in AUC on the test and 1 a loss" in text


def first_sentence(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("- "))


def test_the_first_sentence_is_of_more_real_pictures(tmp_path: Path) -> None:
    nothing = "could not have shown a gain from more real pictures either, so nothing can be said"

    def first(name: str, skills: tuple[float, ...], seeds: int = 3) -> str:
        cells = {("real", "", 4 * n, 0.0): skill for n, skill in enumerate(skills, 1)}
        folder = invented(tmp_path / name, cells | {("added", "mini", 4, 1.0): 1.0}, seeds)
        return first_sentence(said(folder, tmp_path))

    gain = first("gain", (0.0, 0.0, 3.0))
    assert gain.startswith("- Positive control: 12 real pictures in place of 4 changed AUC on the")
    assert "a gain is shown" in gain
    assert nothing not in gain
    for name, skills, seeds in (
        ("none", (1.0, 3.0, 1.0), 3), ("loss", (3.0, 0.0), 3), ("few", (0.0, 3.0), 2),
    ):  # fmt: skip
        assert nothing in first(name, skills, seeds), name
    assert "no sign that this experiment could show a gain" in first("one", (1.0,))


def test_a_bound_that_is_the_arm_real_is_shown_beside_every_size(tmp_path: Path) -> None:
    cells = {("real", "", 4, 0.0): 0.0, ("real", "", 8, 0.0): 3.0, ("added", "mini", 4, 1.0): 0.0}
    folder = invented(tmp_path / "runs", cells)
    about = json.loads((folder / ABOUT).read_text()) | {"same_as_real": {"mini": 8}}
    (folder / ABOUT).write_text(json.dumps(about))
    results, text = Results.read(folder, 200), said(folder, tmp_path)
    small, large = (Key("real", "", "model", size, 0.0, 0) for size in (4, 8))
    (line,) = [one for one in text.splitlines() if "all real pictures that mini saw" in one]
    assert line.startswith("- With 4 real pictures, learning from all")
    assert line.endswith("a gain is shown.")
    shown = tables.difference(results, large, small, View("test"), "auc")
    assert f"| {shown} |" in text
    assert "| all 8 real that mini saw |" in text
    real = results.bounds("model")
    assert list(real.values()) == [large]


def test_the_same_numbers_the_other_way_round(tmp_path: Path) -> None:
    turned = {("real", "", 4, 0.0): 3.0, ("added", "mini", 4, 1.0): 0.5}
    text = said(invented(tmp_path / "runs", turned), tmp_path)
    assert "adding as many synthetic ones (mini) changed AUC on the test by −0" in text
    assert "a gain is shown" not in text
    assert "0 show a gain in AUC on the test and 1 a loss" in text


def test_tables_have_what_was_run_and_dashes_elsewhere(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", GRID)
    results = Results.read(folder, 100)
    text = said(folder, tmp_path)
    cell = Key("added", "mini", "model", 4, 1.0, 0)
    values = results.values(cell, View("test"), "auc")
    shown = f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    (row,) = [line for line in text.splitlines() if line.startswith("| 4 |") and shown in line][:1]
    assert row.split("|")[3].strip() == shown
    begin = text.index("mini, added:")
    rows = text[begin:].splitlines()[2:6]
    assert rows[0] == "| real | 1 : 0 | 1 : 1 | 1 : 2 |"
    assert rows[3].startswith("| 8 |")
    assert rows[3].endswith("| – |")
    for name in (
        "saw 9 pictures of ISIC (CC0-1.0), of which 8 are labelled",
        "made with the bundle flux (f1)", "1 of the pictures it saw are not known here",
        "4 of the 4 are in the real subset of 4", "its upper bound is the arm `real` at 4",
        "real/x.png = b.png (w; generator mini)", "calling all benign is right for 0.500",
        "2 validation pictures have a copy", "1 more that not every run was tested on",
        "histology-confirmed alone", "border alone", "0.7783", "digitised from the figure, ±0.0003",
        "| all | – | 21 | 0.21 | 0.10 | 0.00 |",
    ):  # fmt: skip
        assert name in text, name
    with Image.open(tmp_path / "report.png") as image:
        assert image.width > 1500


def test_fewer_seeds_are_said(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", {("real", "", 4, 0.0): 1.0}, seeds=1)
    with journal.Journal(folder) as book:
        (line,) = journal.lines(folder).values()
        for seed in (0, 1):
            key = Key("added", "mini", "model", 4, 1.0, seed)
            book.append(dict(line) | {"key": key.document()})
    results = Results.read(folder, 100)
    added, real = Key("added", "mini", "model", 4, 1.0, 0), Key("real", "", "model", 4, 0.0, 0)
    assert tables.mean(results, real, View("test"), "auc").endswith("(n=1)")
    assert "n=" not in tables.mean(results, added, View("test"), "auc")
    found = results.difference(added, real, View("test"), "auc")
    assert found is not None
    assert found["seeds"] == 1
    assert "1 seed): too few" in said(folder, tmp_path)


def test_pictures_that_not_every_run_has_are_left_out(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", {("real", "", 4, 0.0): 1.0}, seeds=2)
    key = Key("real", "", "model", 4, 0.0, 1)
    line = dict(journal.lines(folder)[key])
    whole = Scores.read(folder / line["scores"])
    content = whole.where(np.arange(len(whole.part)) != 3).bytes()
    files.write(folder / line["scores"], content)
    with pytest.raises(DatasetError, match="not what its run wrote"):
        Results.read(folder)
    with journal.Journal(folder) as book:
        book.append(line | {"sha256": hashlib.sha256(content).hexdigest()})
    results = Results.read(folder, 100)
    assert results.counts(View("test"))[0] == N - 1
    assert "real/3.png" not in results.pictures["test"]
    assert len(results.values(key.cell, View("test"), "auc")) == 2


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no finished run"):
        Results.read(tmp_path)
    folder = invented(tmp_path / "runs", {("real", "", 4, 0.0): 1.0}, seeds=1)
    with pytest.raises(DatasetError, match="give the report's file"):
        report.write(folder, tmp_path)
    text = said(folder, tmp_path)
    assert "there is nothing to compare" in text
    (folder / ABOUT).unlink()
    with pytest.raises(DatasetError, match="writes it again"):
        Results.read(folder)
    (folder / journal.NAME).write_text('{"key": 3}\n')
    with pytest.raises(DatasetError, match="line 1 is no run"):
        Results.read(folder)


def test_runs_that_cannot_be_compared_are_no_report(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", {("real", "", 4, 0.0): 1.0, ("classic", "", 4, 0.0): 1.0})
    line = next(iter(journal.lines(folder).values()))

    def adds(arm: str, seed: int, settings: dict[str, Any], **more: Any) -> Path:
        copy = shutil.copytree(folder, tmp_path / f"{arm}{seed}{len(list(tmp_path.iterdir()))}")
        key = Key(arm, "mini" * (arm == "added"), "model", 4, float(arm == "added"), seed)
        with journal.Journal(copy) as book:
            book.append({**line, "key": key.document(), "settings": settings, **more})
        return copy

    def of(**recipe: Any) -> dict[str, Any]:
        return {"recipe": RECIPE | recipe, "pretrained": None}

    Results.read(adds("real", 7, of(seed=7)))
    Results.read(adds("class-weights", 0, of(class_weights="balanced")))
    for arm, settings, said in (
        ("real", of(steps=8), "recipe.steps is 4 in real_model_4_0_0 and 8 in real_model_4_0_7"),
        ("added", of(augment="none"), "recipe.augment"),
        ("classic", of(rate=0.1), "recipe.rate"),
        ("class-weights", of(rate=0.1), "recipe.rate"),
        ("real", {"recipe": RECIPE, "pretrained": "w"}, "pretrained"),
        ("real", of() | {"tests": {"test": "a"}}, "tests.test"),
    ):
        with pytest.raises(DatasetError, match=f"cannot be compared: {said}"):
            Results.read(adds(arm, 7, settings))


def test_what_a_generator_saw_is_what_its_runs_say(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", GRID, seeds=1)
    facts = {"saw": ["a"], "pictures": 77, "labelled": 1, "made": 7, "unknown": 0, "sources": [],
             "in_subset": {"4": 2}}  # fmt: skip
    found = journal.lines(folder)
    first, second = (key for key in found if key.arm == "added" and key.size == 4)
    with journal.Journal(folder) as book:
        book.append({**found[first], "saw": facts})
        book.append({**found[second], "saw": facts | {"in_subset": {"8": 3}}})
    text = said(folder, tmp_path, 50)
    assert "`mini`: saw 77 pictures" in text
    assert "2 of the 77 are in the real subset of 4" in text
    assert "3 of the 77 are in the real subset of 8" in text
    with journal.Journal(folder) as book:
        book.append({**found[second], "saw": facts | {"pictures": 78}})
    with pytest.raises(DatasetError, match="generator mini that saw something else: pictures was"):
        Results.read(folder)


def test_control_is_measured_on_the_controls_score(tmp_path: Path) -> None:
    folder = invented(tmp_path / "runs", {("real", "", 4, 0.0): 5.0}, seeds=1)
    results = Results.read(folder, 100)
    (cell,) = results.cells
    assert results.values(cell, View("test"), "auc")[0] > 0.95
    assert results.values(cell, View("test", control="border"), "auc")[0] < 0.8


def test_the_papers_grid_is_the_figures() -> None:
    sizes: dict[str, Any] = {name: list(rows) for name, rows in paper.ACCURACY.items()}
    assert sizes == {name: [2500, 5000, 7500, 10000] for name in ("ViT", "ResNeXt")}
    for rows in paper.ACCURACY.values():
        assert {len(row) for row in rows.values()} == {len(paper.RATIOS)}
    best = max(max(row) for row in paper.ACCURACY["ViT"].values())
    assert best == paper.ACCURACY["ViT"][2500][paper.RATIOS.index(1.75)] == 0.7783
    assert list(paper.ROC)[0] == "DermaFlux-ViT"
    assert raw.VAL == "val"
