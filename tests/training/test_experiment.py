from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from training import data, leaks
from training.experiment import alike, guard, journal, plan, raw, sentences, trial
from training.experiment.__main__ import main
from training.experiment.config import Config, changed
from training.experiment.key import Key, Only, planned
from training.experiment.sets import Sets, chosen

MODEL = {
    "size": 16, "margin": 2, "batch": 8, "steps": 4, "warmup": 1, "ema": 0.5, "precision": "fp32",
    "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1},
}  # fmt: skip


def picture(malignant: bool, seed: int, side: int = 48) -> Image.Image:
    """A mottled disc on mottled skin: no two are one picture."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    pixels = np.full((side, side, 3), (226, 188, 168), dtype=np.float64)
    inside = np.hypot(rows - side / 2, columns - side / 2) < (16 if malignant else 8)
    pixels[inside] = (60, 30, 20) if malignant else (140, 90, 60)
    coarse = Image.fromarray(random.integers(0, 256, (12, 12), dtype=np.uint8))
    mottled = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((pixels + (mottled[..., None] - 128) / 2).clip(0, 255).astype(np.uint8))


def made(folder: Path, splits: Sequence[str], seed: int, confirmed: str = "") -> Path:
    """A dataset whose every second picture is malignant."""
    folder.mkdir()
    records = []
    for number, split in enumerate(splits):
        malignant = number % 2 == 1
        picture(malignant, seed + number).save(folder / f"{folder.name}{number:03}.png")
        records.append(
            Record(
                f"{folder.name}{number:03}.png", "malignant" if malignant else "benign",
                split=split, source=folder.name, licence="CC0-1.0",
                confirmed=confirmed or ("histo" if number % 4 < 2 else "follow_up"),
            )
        )  # fmt: skip
    dataset.write(folder, records)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real pictures, a second test, and what a generator drew."""
    root = tmp_path_factory.mktemp("experiment")
    made(root / "real", ("train",) * 12 + ("val",) * 8 + ("test",) * 12, 0)
    made(root / "elsewhere", ("test",) * 8, 500)
    made(root / "drawn", ("train",) * 24, 1000, "synthetic")
    return root


def settings(root: Path, **more: Any) -> dict[str, Any]:
    return {
        "real": str(root / "real"), "external": [str(root / "elsewhere")],
        "sizes": [4, 8], "ratios": [0, 1.5], "seeds": 2, "model": MODEL,
        "generators": {"mini": {"data": str(root / "drawn"), "saw": str(root / "real")}},
        "arms": ["real", "added"], **more,
    }  # fmt: skip


def written(file: Path, value: Any) -> Path:
    file.write_text(yaml.safe_dump(value, sort_keys=False))
    return file


def experiment(root: Path, tmp_path: Path, **more: Any) -> Path:
    return written(tmp_path / "experiment.yaml", settings(root, **more))


def facts(out: Path) -> dict[Key, Any]:
    """What runs gave, without what differs from one to the next of the same run."""
    free = ("seconds", "cpu_seconds", "gpu_seconds")
    return {
        key: {name: value for name, value in line.items() if name not in free}
        for key, line in journal.lines(out).items()
    }


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs, uninterrupted: two sizes, two ratios, two seeds."""
    tmp_path = tmp_path_factory.mktemp("whole")
    assert main([str(experiment(folder, tmp_path)), "--out", str(tmp_path / "runs")]) == 0
    return tmp_path / "runs"


def test_a_resumed_experiment_is_the_uninterrupted_one(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    file, out = experiment(folder, tmp_path), tmp_path / "runs"
    assert main([str(file), "--out", str(out), "--only", "seed=0,arm=real"]) == 0
    assert len(journal.lines(out)) == 2
    with (out / journal.NAME).open("ab") as stream:
        stream.write(b'{"key": {"arm": "added"')  # killed while it wrote
    assert len(journal.lines(out)) == 2
    before = (out / journal.NAME).read_bytes().split(b"\n")[:2]
    assert main([str(file), "--out", str(out)]) == 0
    assert (out / journal.NAME).read_bytes().split(b"\n")[:2] == before
    assert facts(out) == facts(whole)
    assert len(facts(out)) == 8
    for key in facts(out):
        scores = f"scores/{key.file}.npz"
        assert (out / scores).read_bytes() == (whole / scores).read_bytes()


def test_two_processes_give_what_one_gives(whole: Path, folder: Path, tmp_path: Path) -> None:
    file, out = experiment(folder, tmp_path), tmp_path / "runs"
    arguments = ["--only", "size=4,seed=1", "--processes", "2"]
    assert main([str(file), "--out", str(out), *arguments]) == 0
    expected = {k: v for k, v in facts(whole).items() if k.size == 4 and k.seed == 1}
    assert facts(out) == expected
    assert len(expected) == 2


def test_figures_follow_from_the_raw_scores(whole: Path) -> None:
    for line in journal.lines(whole).values():
        scores = raw.Scores.read(whole / line["scores"])
        calibration = raw.calibrated(scores.where(scores.part == raw.VAL))
        assert calibration == pytest.approx(line["calibration"])
        for name in ("test", "elsewhere"):
            found = raw.measured(scores.where(scores.part == name), calibration)
            assert raw.rounded(found) == line["metrics"][name]


def test_changed_settings_are_refused_and_more_seeds_add_runs(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = experiment(folder, tmp_path, model=MODEL | {"steps": 5})
    assert main([str(longer), "--out", str(whole)]) == 2
    assert "another recipe.steps: 4, and now it is 5" in capsys.readouterr().err
    more = experiment(folder, tmp_path, seeds=3, arms=["real", "added", "classic"])
    assert main([str(more), "--out", str(whole), "--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[-1]) | {"hours": 0} == {
        "runs": 18, "done": 8, "hours": 0, "of_unknown_time": 0,
    }  # fmt: skip
    assert told.count("done  real_model_4_0_0") == 1
    assert "to do classic_model_8_0_0" in told


def test_runs_of_other_steps_are_not_added_to_a_folder(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(model: dict[str, Any], only: str) -> int:
        file = experiment(folder, tmp_path, model=model, seeds=3, arms=["real", "classic"])
        return main([str(file), "--out", str(whole), "--list", "--only", only])

    for only in ("seed=2", "arm=classic"):  # none of these is there
        assert asked(MODEL, only) == 0
        assert asked(MODEL | {"steps": 5}, only) == 2
        assert "recipe.steps: 4, and now it is 5" in capsys.readouterr().err
    # Nor on fewer tests.
    alone = experiment(folder, tmp_path, external=[], seeds=3)
    assert main([str(alone), "--out", str(whole), "--list", "--only", "seed=2"]) == 2
    assert "another tests.elsewhere" in capsys.readouterr().err


def test_a_default_that_came_later_is_no_change() -> None:
    key = Key("real", "", "model", 4, 0.0, 0)
    now = {"recipe": {"steps": 4, "cutmix": 0.0}, "learnt": "a"}
    alike.same(key, {"recipe": {"steps": 4}, "learnt": "a"}, now, Path("x"))
    with pytest.raises(DatasetError, match="another recipe.cutmix"):
        alike.same(key, {"recipe": {"steps": 4, "cutmix": 1.0}, "learnt": "a"}, now, Path("x"))
    with pytest.raises(DatasetError, match="another learnt"):
        alike.same(key, {"recipe": {"steps": 4}, "learnt": "b"}, now, Path("x"))


def test_a_seen_test_picture_is_refused_or_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = [s for s in data.read(folder / "real") if s.split == "test"]
    leaks.index([*data.read(folder / "drawn"), tests[3]]).save(tmp_path / "seen.npz")
    generators = {"mini": {"data": str(folder / "drawn"), "saw": str(tmp_path / "seen.npz")}}
    file, out = experiment(folder, tmp_path, generators=generators), tmp_path / "runs"
    arguments = [str(file), "--out", str(out), "--only", "size=4,seed=0,arm=real"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "1 of 12 pictures of the test 'test' were seen" in said
    assert tests[3].file.name in said
    assert "generator mini or its captions" in said
    assert not out.exists()
    assert main([*arguments, "--leave-out"]) == 0
    (line,) = journal.lines(out).values()
    scores = raw.Scores.read(out / line["scores"])
    names = [Path(name).name for name in scores.picture[scores.part == "test"]]
    assert names == [s.file.name for s in tests if s != tests[3]]
    capsys.readouterr()
    report = tmp_path / "report.md"
    assert main(["--report", str(out), "--out", str(report)]) == 0
    assert f"real/{tests[3].file.name} = {tests[3].file.name}" in report.read_text()
    assert (
        "11 pictures, 5 malignant, of 12; calling all benign is right for 0.545; 1 left"
        in report.read_text()
    )


def test_a_generated_copy_of_a_test_picture_is_not_learnt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = shutil.copytree(folder / "drawn", tmp_path / "drawn")
    test = next(s for s in data.read(folder / "real") if s.split == "test")
    with Image.open(test.file) as image:  # benign, as drawn000 is
        image.resize((40, 40)).save(drawn / "drawn000.png")
    generators = {"mini": {"data": str(drawn), "saw": str(folder / "real")}}
    file = experiment(folder, tmp_path, generators=generators, sizes=[4], seeds=1)
    out, report = tmp_path / "runs", tmp_path / "report.md"
    assert main([str(file), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "1 of 24 pictures of generator mini stand in a test" in said
    assert f"drawn/drawn000.png = real/{test.file.name}" in said
    assert main([str(file), "--out", str(out), "--leave-out"]) == 0
    assert main([str(file), "--out", str(out), "--list"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["done"] == 2
    for line in journal.lines(out).values():
        tested = raw.Scores.read(out / line["scores"])
        assert f"real/{test.file.name}" in tested.picture
    assert main(["--report", str(out), "--out", str(report)]) == 0
    assert f"drawn/drawn000.png = real/{test.file.name} of the test" in report.read_text()
    assert "23 generated pictures to draw from" in report.read_text()


def test_all_of_a_lesion_that_was_seen_is_left_out(folder: Path, tmp_path: Path) -> None:
    real = shutil.copytree(folder / "real", tmp_path / "real")
    records = dataset.read(real)
    tests = [number for number, one in enumerate(records) if one.split == "test"]
    for number in tests[:2]:
        records[number] = replace(records[number], group="lesion 1")
    # Another source's lesion 1 is another lesion.
    records[tests[2]] = replace(records[tests[2]], group="lesion 1", source="elsewhere")
    dataset.write(real, records)
    # What saw it knows nothing of lesions.
    with Image.open(real / records[tests[0]].file_name) as image:
        image.save(tmp_path / "other.png")
    leaks.look([(tmp_path / "other.png", "")]).index.save(tmp_path / "seen.npz")
    generators = {"mini": {"data": str(folder / "drawn"), "saw": str(tmp_path / "seen.npz")}}
    config = Config.read(
        experiment(folder, tmp_path, real=str(real), external=[], generators=generators)
    )
    sets = Sets.read(config)
    held = guard.guard(sets, config, True)
    names = [records[number].file_name for number in tests]
    assert [one.file for one in held.left_out["test"]] == [f"real/{name}" for name in names[:2]]
    assert held.left_out["test"][1].why == f"group lesion 1 of real/{names[0]}"
    assert [s.file.name for s in held.kept(sets)["test"]] == names[2:]


def test_a_call_without_generators_forgets_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = [s for s in data.read(folder / "real") if s.split == "test"]
    leaks.index([*data.read(folder / "drawn"), tests[3]]).save(tmp_path / "seen.npz")
    generators = {"mini": {"data": str(folder / "drawn"), "saw": str(tmp_path / "seen.npz")}}
    more: dict[str, Any] = {"generators": generators, "sizes": [4], "seeds": 1}
    out, report = tmp_path / "runs", tmp_path / "report.md"
    arguments = ["--out", str(out), "--leave-out"]
    assert main([str(experiment(folder, tmp_path, **more)), *arguments]) == 0
    plain = more | {"generators": {}, "arms": ["real"], "seeds": 2}
    assert main([str(experiment(folder, tmp_path, **plain)), *arguments]) == 0
    assert main(["--report", str(out), "--out", str(report)]) == 0
    text = report.read_text()
    assert "`mini`: saw 25 pictures" in text
    assert "24 generated pictures to draw from" in text
    assert f"real/{tests[3].file.name} = {tests[3].file.name}" in text
    command = f"python -m training.experiment {tmp_path / 'experiment.yaml'} --out {out}"
    assert text.splitlines().count(f"{command} --leave-out") == 1
    assert f"--report {out} --out {report}" in text
    assert "docs/experiment.yaml" not in text
    # Another generator under the same name, of as many pictures.
    leaks.index([*data.read(folder / "drawn"), tests[4]]).save(tmp_path / "seen.npz")
    capsys.readouterr()
    assert main([str(experiment(folder, tmp_path, **more | {"seeds": 3})), *arguments]) == 2
    assert "generator mini that saw something else: digest" in capsys.readouterr().err


def test_one_run_that_fails_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    true = trial.run

    def fails(key: Key, *rest: Any) -> dict[str, Any]:
        if key.size == 4:
            raise DatasetError("diverged")
        return true(key, *rest)

    monkeypatch.setattr(trial, "run", fails)
    file, out = experiment(folder, tmp_path, seeds=1, arms=["real"]), tmp_path / "runs"
    assert main([str(file), "--out", str(out)]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == {"real_model_4_0_0": "diverged"}
    assert [key.size for key in journal.lines(out)] == [8]
    monkeypatch.setattr(trial, "run", true)
    assert main([str(file), "--out", str(out)]) == 0
    assert len(journal.lines(out)) == 2


def test_what_a_run_learns(folder: Path, tmp_path: Path) -> None:
    config = Config.read(
        experiment(folder, tmp_path, arms=["real", "added", "synthetic-only", "upper"])
    )
    sets = Sets.read(config)

    def files(*key: Any) -> list[str]:
        return [s.file.name for s in chosen(sets, config, Key(*key))]

    small, large = files("real", "", "model", 4, 0.0, 0), files("real", "", "model", 8, 0.0, 1)
    assert set(small) < set(large)
    assert files("real", "", "model", 4, 0.0, 7) == small
    both = files("added", "mini", "model", 4, 1.5, 0)
    assert both[:4] == small
    assert both[4:] == files("synthetic-only", "mini", "model", 4, 1.5, 0)
    assert len(both) == 10
    assert set(both[4:]) != set(files("synthetic-only", "mini", "model", 4, 1.5, 1))
    assert len(files("upper", "mini", "model", 12, 0.0, 0)) == 12
    with pytest.raises(DatasetError, match="generator mini: .*needs 16 synthetic benign"):
        files("added", "mini", "model", 8, 4.0, 0)


def test_a_test_that_is_another_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is the real dataset"):
        Sets.read(Config.read(experiment(folder, tmp_path, external=[str(folder / "real")])))
    other = shutil.copytree(folder / "real", tmp_path / "real")
    with pytest.raises(DatasetError, match="is called real already"):
        Sets.read(Config.read(experiment(folder, tmp_path, external=[str(other)])))
    copy = shutil.copytree(folder / "real", tmp_path / "copy")
    config = Config.read(experiment(folder, tmp_path, external=[str(copy)]))
    with pytest.raises(DatasetError, match="every picture of the test 'copy' is one of the test"):
        guard.guard(Sets.read(config), config, True)


def test_an_empty_journal_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    with journal.Journal(out):
        with pytest.raises(DatasetError, match="being written by another process"):
            journal.Journal(out)
        assert (out / journal.NAME).exists()
    assert not out.exists()
    out.mkdir()
    with journal.Journal(out):
        pass
    assert list(tmp_path.rglob("*")) == [out]
    with journal.Journal(out) as book:
        book.append({"key": Key("real", "", "model", 4, 0.0, 0).document()})
    with journal.Journal(out):
        pass
    assert len(journal.lines(out)) == 1


def test_an_index_tells_what_the_upper_bound_may_learn(folder: Path, tmp_path: Path) -> None:
    real = [s for s in data.read(folder / "real") if s.split == "train"]
    leaks.index([*real[:6], *data.read(folder / "elsewhere")]).save(tmp_path / "seen.npz")
    generators = {"mini": {"data": str(folder / "drawn"), "saw": str(tmp_path / "seen.npz")}}
    sets = Sets.read(Config.read(experiment(folder, tmp_path, generators=generators)))
    assert sets.uppers["mini"] == real[:6]
    assert sets.unknown["mini"] == 8


def test_a_subset_is_a_dataset_and_its_generator_is_held_to_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = experiment(folder, tmp_path)
    subset = tmp_path / "subset"
    for size in ("0", "-4"):
        assert main([str(plain), "--subset", size, "--out", str(subset)]) == 2
        assert f"--subset {size}: a number" in capsys.readouterr().err
    assert main([str(plain), "--subset", "4", "--out", str(subset)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"out": str(subset), "pictures": 4, "malignant": 2}
    config = Config.read(plain)
    names = [s.file.name for s in Sets.read(config).subset(4)]
    assert [s.file.name for s in data.read(subset)] == names
    one = {"data": str(folder / "drawn"), "saw": str(subset), "sizes": [4], "subset": True}
    file = experiment(
        folder, tmp_path, generators={"small": one}, arms=["real", "added", "upper"], seeds=1
    )
    config = Config.read(file)
    sets = Sets.read(config)
    # What it saw is the arm real at 4: no run of its own.
    assert plan.uppers(config, sets) == {}
    assert plan.same_as_real(config, sets) == {"small": 4}
    assert guard.guard(sets, config, False).saw["small"]["in_subset"] == {"4": 4}
    assert [(k.arm, k.size) for k in planned(config, {})] == [
        ("real", 4), ("added", 4), ("real", 8),
    ]  # fmt: skip
    more = replace(config.generators["small"], saw=str(folder / "real"))
    config = replace(config, generators={"small": more})
    with pytest.raises(DatasetError, match="8 of the 12 pictures it saw are not in it"):
        guard.guard(Sets.read(config), config, False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratio": [1]}, "unknown key 'ratio'"),
        ({"model": MODEL | {"stepz": 3}}, "models.model has an unknown key 'stepz'"),
        ({"model": MODEL | {"steps": None}}, "has no steps"),
        ({"model": MODEL | {"seed": 3}}, "has seed: seeds vary by run"),
        ({"model": MODEL | {"hours": 3}}, "has hours: every arm takes the same number of steps"),
        ({"model": MODEL | {"auxiliary": True}}, "synthetic pictures have no masks"),
        ({"model": MODEL | {"sampling": "some"}}, "sampling 'some'"),
        ({"models": {"vit": MODEL}}, "either model or models"),
        ({"sizes": [4, 4]}, "sizes names one twice"),
        ({"sizes": "4"}, "sizes needs a list"),
        ({"ratios": [-1]}, "ratios has -1"),
        ({"seeds": 0}, "seeds is 0"),
        ({"arms": ["best"]}, "arms has 'best'"),
        ({"generators": {}}, "arm added needs generators"),
        ({"generators": {"a": {"data": "b"}}}, "generators.a has no key 'saw'"),
        ({"generators": {"a": {"data": "b", "saw": []}}}, "saw is empty"),
        ({"generators": {"a": {"data": "b", "saw": "c", "sizes": [5]}}}, "has 5, which sizes"),
        ({"generators": {"a/b": {"data": "b", "saw": "c"}}}, "is no name"),
    ],
)
def test_a_config_is_read_strictly(
    change: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="experiment.yaml") as caught:
        Config.read(experiment(folder, tmp_path, **change))
    assert said in str(caught.value)


def test_yaml_that_says_a_thing_twice_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    for text, said in (
        ("real: a\nreal: b\n", "line 2: 'real' stands there twice"),
        ("real: [a\n", "is not YAML"),
        ("", "needs an object"),
    ):
        file.write_text(text)
        with pytest.raises(DatasetError, match=said):
            Config.read(file)
    with pytest.raises(DatasetError, match="cannot be read"):
        Config.read(tmp_path / "none.yaml")


def test_rates_are_numbers_as_everybody_writes_them(folder: Path, tmp_path: Path) -> None:
    file = experiment(folder, tmp_path, model=MODEL | {"rate": 0.5})
    file.write_text(file.read_text().replace("rate: 0.5", "rate: 1e-3"))
    assert Config.read(file).recipes()["model"].recipe.rate == 0.001


def test_arms_differ_in_what_they_are_named_for(folder: Path, tmp_path: Path) -> None:
    recipe = Config.read(experiment(folder, tmp_path)).recipes()["model"].recipe
    assert changed(recipe, "real", 3) == replace(recipe, seed=3)
    assert changed(recipe, "classic", 0) == replace(recipe, augment="dermoscopy")
    assert changed(recipe, "class-weights", 0) == replace(recipe, class_weights="balanced")
    with pytest.raises(DatasetError, match="classic is arm real"):
        changed(replace(recipe, augment="dermoscopy"), "classic", 0)
    with pytest.raises(DatasetError, match="class-weights is arm real"):
        changed(replace(recipe, class_weights="1,4"), "class-weights", 0)


def test_small_comparisons_are_whole_first(folder: Path, tmp_path: Path) -> None:
    config = Config.read(experiment(folder, tmp_path, ratios=[0, 1, 3]))
    keys = planned(config, {})
    assert [(k.seed, k.size, k.arm, k.ratio) for k in keys[:7]] == [
        (0, 4, "real", 0), (0, 4, "added", 1), (0, 4, "added", 3),
        (0, 8, "real", 0), (0, 8, "added", 1), (0, 8, "added", 3), (1, 4, "real", 0),
    ]  # fmt: skip
    only = Only.parsed("arm=added, size=8,size=4,ratio=3")
    assert [k.size for k in keys if only.takes(k)] == [4, 8, 4, 8]
    for text in ("colour=red", "arm", "size=small"):
        with pytest.raises(DatasetError, match="--only"):
            [Only.parsed(text).takes(key) for key in keys]


def test_the_threshold_makes_balanced_accuracy_largest() -> None:
    p = np.array([0.1, 0.2, 0.3, 0.6, 0.7])
    assert raw.threshold(p, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.45)
    assert raw.threshold(p, np.array([0, 0, 1, 0, 1])) == pytest.approx(0.25)
    assert raw.threshold(np.full(4, 0.5), np.array([0, 0, 1, 1])) == 0.5


def test_a_gain_is_said_only_of_what_is_printed_above_zero() -> None:
    def said(value: float, low: float, high: float, seeds: int = 5) -> str:
        found = {"value": value, "interval": [low, high], "seeds": seeds}
        return sentences.changed("adding things", 500, "AUC", found)

    assert said(0.02, 0.0043, 0.0401).endswith(
        "changed AUC by +0.020 (95 % interval +0.004 to +0.041, 5 seeds): a gain is shown."
    )
    assert "0.000 to +0.041, 5 seeds): no gain is shown" in said(0.02, 0.0003, 0.0401)
    assert said(-0.02, -0.04, -0.001).endswith("a loss is shown.")
    assert "−0.040 to −0.001" in said(-0.02, -0.04, -0.001)
    assert "no gain is shown, nor a loss" in said(0.03, -0.001, 0.06)
    assert said(0.02, 0.01, 0.03, 2).endswith("2 seeds): too few seeds to show anything.")
    assert said(0.02, 0.01, 0.03, 3).endswith("3 seeds): a gain is shown.")
    nothing = {"value": None, "interval": None, "seeds": 2, "note": "one class"}
    assert "cannot be compared (one class)" in sentences.changed("x", 4, "AUC", nothing)


def test_sums_of_comparisons_count_both_ways() -> None:
    rows = [(0.1, 0.2), (0.1, 0.3), (-0.1, 0.1), (-0.3, -0.2)]
    found = [{"value": 0.0, "interval": list(row), "seeds": 5} for row in rows]
    said = sentences.summed(found, "AUC")
    assert "Of 4 comparisons" in said
    assert "2 show a gain in AUC and 1 a loss" in said
    assert "about 0.1 of each" in said
    few = [one | {"seeds": 2} for one in found]
    assert sentences.summed(few, "AUC").startswith("No comparison of AUC has an interval over 3")
    assert sentences.summed([*few, *found], "AUC") == said


def test_doing_names_the_generator_and_ratio() -> None:
    cell = Key("added", "mini", "model", 500, 1.75, 0)
    assert sentences.doing(cell) == "adding 1.75 times as many synthetic ones (mini)"
    assert "adding as many" in sentences.doing(replace(cell, ratio=1.0))
    assert math.isclose(sentences.outward([0.002, 0.002])[0], 0.002)
    assert sentences.outward([0.002, 0.002]) == (0.002, 0.002)


def test_weights_that_saw_a_test_are_refused_or_its_picture_left_out(
    folder: Path, tmp_path: Path
) -> None:
    before = made(tmp_path / "before", ("train",) * 4, 2000)
    shutil.copy(folder / "elsewhere" / "elsewhere003.png", before / "before003.png")
    model = {**MODEL, "pretrained": str(tmp_path / "weights"), "saw": str(before)}
    config = Config.read(experiment(folder, tmp_path, model=model))
    sets = Sets.read(config)
    with pytest.raises(DatasetError, match="weights that model begins with"):
        guard.guard(sets, config, leave_out=False, threads=1)
    held = guard.guard(sets, config, leave_out=True, threads=1)
    assert {one.file for one in held.left_out["elsewhere"]} == {"elsewhere/elsewhere003.png"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"pretrained": "weights"}, "pretrained without saw"),
        ({"saw": []}, "saw without pretrained"),
        ({"pretrained": "weights", "saw": 3}, "saw needs a path or a list of paths"),
        ({"pretrained": 3, "saw": []}, "pretrained needs a path"),
    ],
)
def test_what_weights_saw_is_said(
    folder: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(DatasetError, match=said):
        Config.read(experiment(folder, tmp_path, model={**MODEL, **more}))


def test_other_weights_at_the_same_path_are_another_recipe(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    model = {**MODEL, "pretrained": str(weights), "saw": []}
    config = Config.read(experiment(folder, tmp_path, model=model))
    found = []
    for content in (b"first", b"second"):
        (weights / "model.safetensors").write_bytes(content)
        asked = plan.plan(config, Sets.read(config), tmp_path / "runs", Only({}))
        found.append({one["pretrained"] for one in asked.settings.values()})
    assert len(found[0]) == len(found[1]) == 1
    assert found[0] != found[1]
