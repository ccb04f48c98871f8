"""Fitting the gate: limits by validation, rates by test, and the same verdicts as the runtime's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux.checkpoint import Checkpoint
from dermaflux.intake import Intake
from export.source import write_settings
from training import data, intake
from training.intake_fit import balance, fitted, limits, look, lowest, rate, verdicts
from training.outliers import KINDS, photograph
from training.preparation import prepared

RECIPE = intake.Recipe(axes=3, components=1, lesion_axes=3, drawn=20, outliers=1)


@pytest.fixture(scope="module")
def made(dataset, tiny_checkpoint, tmp_path_factory):
    """A checkpoint with a gate, and what was reported of it."""
    folder = tmp_path_factory.mktemp("gated") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    return folder, intake.run(folder / "classifier", data.read(dataset), RECIPE)


def picture(seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)


def test_what_is_written_opens_as_part_of_the_checkpoint_and_of_a_bundle(made, tmp_path):
    folder, document = made
    written = json.loads((folder / "classifier/intake.json").read_text())
    assert written == json.loads(json.dumps(document))
    checkpoint = Checkpoint.open(folder)
    gate = Intake.open(checkpoint.classifier.intake, folder)
    write_settings(checkpoint, tmp_path, ("classifier",))
    again = Intake.open(checkpoint.classifier.intake, tmp_path)
    features = np.zeros(32, np.float32)
    assert gate.scores(picture(), features) == again.scores(picture(), features)


def test_figures_count_every_test_picture(made):
    _, document = made
    for way in ("as_they_are", "prepared_otherwise"):
        whole = document["test"][way]["all"]
        by_label = document["test"][way]["drawn"]
        assert whole["pictures"] == by_label["all"]["pictures"] == 6
        assert by_label["benign"]["pictures"] == by_label["malignant"]["pictures"] == 3
        low, high = whole["interval"]
        assert low <= whole["rate"] <= high
    assert set(document["outliers"]) == set(KINDS)
    assert document["outliers"]["black"]["refused"] == 1
    # Of a picture without a mask nobody knows where its skin is bare.
    assert document["outliers"]["bare_skin"]["pictures"] == 0


def test_the_limits_let_validation_pass(made):
    _, document = made
    # With so few pictures a share of 1 % is none of them.
    assert document["validation"]["as_they_are"]["all"]["refused"] == 0
    assert document["validation"]["prepared_otherwise"]["all"]["refused"] == 0


def test_measured_and_served_are_the_same_verdicts(made, dataset):
    folder, _ = made
    spec, engine = intake._opened(folder / "classifier")
    gate = Intake.open(Checkpoint.open(folder).classifier.intake, folder)
    pictures = [Image.open(s.file).convert("RGB") for s in data.read(dataset, "test")]
    pictures += [picture(), picture().resize((15, 15)), Image.new("RGB", (64, 64))]
    pictures += [photograph("skimage.data", "chelsea.png")]
    seen = look(pictures, spec, engine)
    found = verdicts(seen, gate.spec, (gate.appearance, gate.features, gate.lesions, gate.textures))
    for row, one in enumerate(pictures):
        told = [reason.code for reason in gate.reasons(one, seen.features[row])]
        assert told == [code for code, refused in found.items() if refused[row]]
    assert not any(refused[0] for refused in found.values())
    assert {code for code, refused in found.items() if refused[6:].any()} >= {
        "too_small", "too_dark", "no_contrast", "blurred", "unlike_training",
    }  # fmt: skip


def test_own_outliers_are_reported_and_an_empty_folder_is_refused(made, dataset, tmp_path):
    folder, _ = made
    everything, few = data.read(dataset), replace(RECIPE, outliers=0)
    with pytest.raises(data.DatasetError, match="has no picture"):
        intake.run(folder / "classifier", everything, few, tmp_path)
    picture().save(tmp_path / "desk.jpg")
    document = intake.run(folder / "classifier", everything, few, tmp_path)
    assert document["outliers"]["own"]["pictures"] == 1


def test_what_cannot_be_fitted_is_refused(made, dataset, capsys):
    folder, _ = made
    everything = data.read(dataset)
    with pytest.raises(data.DatasetError, match="no sample in split val"):
        intake.run(folder / "classifier", [s for s in everything if s.split != "val"], RECIPE)
    lost = [replace(s, file=Path("lost.png")) for s in everything]
    with pytest.raises(data.DatasetError, match=r"lost\.png"):
        intake.run(folder / "classifier", lost, RECIPE)
    assert intake.main([str(folder), "--data", str(dataset)]) == 2
    assert "python -m training.vit" in capsys.readouterr().err


def test_pictures_like_the_fitted_ones_score_above_others():
    random = np.random.default_rng(0)
    # Long tails, a constant and a count: what descriptions have.
    known = np.exp(random.normal(0, 1, (400, 6)))
    known[:, 4] = 1.0
    known[:, 5] = random.integers(0, 3, 400)
    known[:, 1] += known[:, 0]
    known = known.astype(np.float32)
    density = fitted(known[:300], axes=5, components=3, seed=0)
    strange = known[300:].copy()
    strange[:, 1] = 20 - strange[:, 0]
    assert np.median(density.score_all(strange)) < np.quantile(density.score_all(known[300:]), 0.05)
    again = fitted(known[:300], axes=5, components=3, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(*(vars(d).values() for d in (density, again)), strict=True))  # fmt: skip  # noqa: E501


def test_the_lowest_limit_refuses_no_more_than_its_rate():
    scores = np.random.default_rng(0).normal(size=1000)
    equal = np.full(1000, 1 / 1000)
    for wanted in (0.0, 0.0005, 0.01, 0.3):
        limit = lowest(scores, equal, wanted)
        assert (scores < limit).mean() <= wanted
        assert (scores <= limit).mean() >= wanted
    groups = ["small"] * 10 + ["large"] * 990
    weights = balance(groups)
    assert weights.sum() == pytest.approx(1)
    assert weights[:10].sum() == pytest.approx(0.5)


def test_dark_is_never_what_only_light_skin_would_pass(made, dataset):
    folder, _ = made
    seen = look([Image.open(s.file) for s in data.read(dataset, "val")],
                *intake._opened(folder / "classifier"))  # fmt: skip
    weights = np.full(len(seen), 1 / len(seen))
    assert limits(seen, weights, 0.01, 255.0)["light"] > 64
    assert limits(seen, weights, 0.01, 64.0)["light"] == 64


def test_rates_have_exact_intervals():
    found = rate(np.zeros(10, bool))
    assert (found["rate"], found["interval"]) == (0.0, [0.0, 0.3085])
    found = rate(np.arange(20) < 3)
    assert found["interval"] == [0.0321, 0.3789]
    assert rate(np.zeros(0, bool))["rate"] is None


@pytest.mark.parametrize("name", list(KINDS))
def test_kinds_make_pictures_by_their_generator_alone(name):
    mask = np.zeros((80, 96), bool)
    mask[30:50, 40:60] = True
    first, second, other = (
        KINDS[name].make(picture(), mask, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.mode == other.mode == "RGB"
    assert np.array_equal(first, second)
    assert not np.array_equal(first, picture())


def test_bare_skin_has_no_lesion_in_it():
    skin = Image.new("RGB", (100, 100), "pink")
    skin.paste((60, 30, 20), (35, 35, 100, 100))
    mask = np.asarray(skin)[..., 0] == 60
    found = KINDS["bare_skin"].make(skin, mask, np.random.default_rng(0))
    assert np.asarray(found).min() > 60
    assert (
        KINDS["bare_skin"].make(skin, np.ones((100, 100), bool), np.random.default_rng(0)) is None
    )


def test_prepared_pictures_show_the_same_otherwise():
    first, again, other = (prepared(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert first.size != other.size
    means = [np.asarray(p, float).mean((0, 1)) for p in (picture(), first, other)]
    assert np.abs(np.diff(means, axis=0)).max() < 40
