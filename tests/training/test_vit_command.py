"""The command as a whole: a convolutional net, synthetic pictures, several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dermaflux.bundle import ClassifierSpec
from dermaflux.classifier import preprocess
from dermaflux.engines import parts
from training import classifier, data, states, vit
from training.ranks import Ranks, parts_of
from training.recipe import RecipeError
from training.vit_options import parser, recipe_of

TINY = '{"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "drop_path_rate": 0.2}'
VIT = ["--model", "vit_tiny_patch16_224", "--model-args", TINY, "--size", "32", "--batch", "8",
       "--warmup", "1", "--threads", "1", "--precision", "fp32"]  # fmt: skip

PLAIN = ["--model-args", "{}"]


@pytest.fixture
def made(dataset: Path, tmp_path: Path) -> Path:
    """Twelve generated pictures, mirrored and shaded differently from those learnt."""
    folder = tmp_path / "made"
    folder.mkdir()
    random, lines = np.random.default_rng(9), []
    for number in range(12):
        pixels = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number}.png")
        lines.append({
            "file_name": f"{number}.png", "label": ("benign", "malignant")[number % 2],
            "split": "train" if number < 10 else "test", "source": "DermaFlux, bundle x",
            "licence": "Apache-2.0", "confirmed": "synthetic",
        })  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _run(dataset: Path, out: Path, *options: str) -> int:
    return vit.main(["--data", str(dataset), "--out", str(out), *options])


def test_a_convolutional_net_on_real_and_synthetic_pictures(
    dataset: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out, seen = tmp_path / "checkpoint" / "classifier", tmp_path / "seen.npz"
    options = ["--model", "resnet10t", "--size", "32", "--steps", "3", "--batch", "4",
               "--threads", "1", "--crop-pct", "0.875", "--synthetic", str(made), "--ratio", "1.5",
               "--limit", "6", "--seen", str(seen), "--accumulate", "2"]  # fmt: skip
    assert _run(dataset, out, *options) == 0
    assert "sees the 2 pictures of a part at once and not the 4 of a batch" in caplog.text
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["test"]["drawn"]["whole"]["images"] == 6
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["real"] == {"benign": 3, "malignant": 3}
    assert report["data"]["synthetic"] == {"benign": 5, "malignant": 4}
    assert [one["source"] for one in report["saw"]] == ["DermaFlux, bundle x", "drawn"]
    assert (report["steps"], report["recipe"]["model_args"]) == (3, {})
    # What is scored here is what the runtime is given and what the export traces.
    model = classifier.load(out)
    config = json.loads((out / "config.json").read_text())
    shown = config["pretrained_cfg"]
    spec = ClassifierSpec(
        classes=tuple(config["label_names"]), threshold=0.5, temperature=1.0, abstain=(0.4, 0.6),
        **{name: shown[name] if isinstance(shown[name], str | float) else tuple(shown[name])
           for name in ("input_size", "mean", "std", "interpolation", "crop_pct")},
    )  # fmt: skip
    assert shown["classifier"] == "fc"
    whole = data.load_images(data.read(dataset, "test"), 36)
    pixels = np.stack([preprocess(Image.fromarray(one), spec) for one in whole])
    exported: Any = parts.module(out.parent, "classifier")
    logits, features = exported(torch.from_numpy(pixels))
    assert exported.outputs == ("logits", "features")
    assert np.allclose(logits.numpy(), classifier.logits_of(model, whole), atol=1e-5)
    assert np.allclose(features.numpy(), classifier.features_of(model, whole), atol=1e-5)


def test_parts_of_a_batch_are_counted_with_batch_normalisation_in_mind() -> None:
    device = torch.device("cpu")
    normed = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    plain = torch.nn.Sequential(torch.nn.GroupNorm(3, 3))
    recipe = classifier.Recipe(batch=4, accumulate=2)
    assert parts_of(normed, recipe, Ranks(0, 1, device)) == 2
    assert parts_of(plain, recipe, Ranks(0, 2, device)) == 4
    with pytest.raises(RecipeError, match=r"4 parts of one \(2 processes.*give --batch 8"):
        parts_of(normed, recipe, Ranks(0, 2, device))
    with pytest.raises(RecipeError, match="no 6 equal parts"):
        parts_of(plain, recipe, Ranks(0, 3, device))


@pytest.mark.parametrize("name", ["convnext_atto", "nfnet_l0"])
def test_models_that_pool_in_their_head_are_written_and_read(name: str, tmp_path: Path) -> None:
    small: dict[str, Any] = (
        {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]} if name == "convnext_atto" else {}
    )
    recipe = classifier.Recipe(architecture=name, model_args=small, size=32)
    model = classifier.build(recipe)
    assert not hasattr(model, "global_pool")
    classifier.as_shipped(model)
    calibration = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6]}
    classifier.save(model, recipe, calibration, {}, states.History("x", ()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == classifier.described(model, recipe) | {"dermaflux": calibration}
    assert (config["global_pool"], config["pretrained_cfg"]["classifier"]) == ("avg", "head.fc")
    again, images = classifier.load(tmp_path), np.full((1, 32, 32, 3), 90, np.uint8)
    assert np.allclose(
        classifier.logits_of(again, images), classifier.logits_of(model.eval(), images), atol=1e-5
    )


def test_what_cannot_be_described_is_refused_before_the_training(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    def none(*_: object) -> None:
        raise RecipeError("no last layer")

    monkeypatch.setattr(vit.supervise, "fit", never)
    monkeypatch.setattr(classifier, "described", none)
    assert _run(dataset, tmp_path / "out", *VIT, "--steps", "1") == 2
    assert not (tmp_path / "out").exists()


def test_choices_that_cannot_be_are_refused_before_the_training(
    dataset: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(vit.supervise, "fit", never)

    def refused(*options: str) -> str:
        assert _run(dataset, tmp_path / "out", *VIT, *options) == 2
        return capsys.readouterr().err.splitlines()[-1]

    synthetic = ["--synthetic", str(made)]
    assert "needs 6 synthetic benign lesions, and there are 5" in refused(
        *synthetic, "--ratio", "1.5"
    )
    assert "give --synthetic" in refused("--ratio", "1.5")
    assert "is more than the 8 real" in refused("--limit", "9")
    assert "are generated pictures" in refused("--data", str(made))
    assert "is no folder and no file" in refused("--pretrained", str(tmp_path / "none"))
    assert "timm has resnet10t" in refused("--model", "resnet10")
    assert "no 3 equal parts" in refused("--accumulate", "3")
    for one in (["--batch", "1"], ["--batch", "2", "--accumulate", "2"]):
        assert "needs two pictures a part" in refused("--model", "resnet10t", *PLAIN, *one)
    assert "both weights; give one" in refused("--pretrained", "x", "--start", "y")
    # A generator that gives a test picture back is found, whoever drew it.
    shutil.copy(dataset / "015.png", made / "1.png")
    assert _run(dataset, tmp_path / "out", *VIT, *synthetic) == 2
    assert "1 of 6 test pictures were seen by this training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_asked_for_is_as_the_recipe_has_it() -> None:
    given = ["--data", "x", "--out", "y"]
    read = parser("vit", "").parse_args
    assert recipe_of(read(given), None) == classifier.Recipe()
    small = recipe_of(read([*given, "--size", "64", "--epochs", "2.5"]), None)
    assert (small.model_args["img_size"], small.margin, small.epochs) == (64, 8, 2.5)
    assert small.model_args["embed_dim"] == 160
    large = recipe_of(read([*given, "--model", "vit_base_patch16_224", "--margin", "0"]), None)
    assert (large.model_args, large.size, large.margin) == ({"img_size": 224}, 224, 0)
    plain = recipe_of(read([*given, "--model", "resnext50_32x4d", "--auxiliary", "off"]), None)
    assert (plain.model_args, plain.auxiliary, plain.augment) == ({}, False, "dermoscopy")


def _processes(count: int, arguments: list[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "training.vit", *arguments], cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1


def test_two_processes_are_one_process_of_the_same_batch(dataset: Path, tmp_path: Path) -> None:
    """Of the same parts of a batch, to the bit: drop path too falls alike."""
    states = []
    same = [*VIT, "--steps", "4", "--evaluate", "2", "--mixup", "0.3", "--data", str(dataset)]
    for name in ("one", "two"):
        rest = ["--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}.pt")]
        if name == "two":
            _processes(2, [*same, *rest])
        else:
            assert vit.main([*same, *rest, "--accumulate", "2", "--device", "cpu"]) == 0
        states.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    one, two = states
    for which in ("model", "average"):
        for key, value in one[which].items():
            assert torch.allclose(value, two[which][key], atol=1e-6), key
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-6)
    assert one["history"]["validation"] == two["history"]["validation"]
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    assert reports[0]["calibration"] == reports[1]["calibration"]
