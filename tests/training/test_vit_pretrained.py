"""Pretrained weights from folders and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from training import classifier, states, vit_options
from training.data import DatasetError
from training.pretrained import Pretrained
from training.recipe import Recipe, RecipeError

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
RECIPE = Recipe(architecture=NAME, model_args={**SMALL, "img_size": 32}, size=32)


@pytest.fixture(scope="module")
def learnt() -> dict[str, torch.Tensor]:
    """A classifier of 7 classes at 64 pixels."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=7, img_size=64, **SMALL)
    for value in model.parameters():
        torch.nn.init.normal_(value)
    return dict(model.state_dict())


@pytest.fixture
def folder(tmp_path: Path, learnt: dict[str, torch.Tensor]) -> Path:
    """timm's own layout."""
    made = tmp_path / "vit_tiny.seen_in21k"
    made.mkdir()
    save_file({name: value.contiguous() for name, value in learnt.items()},
              made / "model.safetensors")  # fmt: skip
    config = {
        "architecture": NAME, "num_classes": 7, "model_args": {**SMALL, "img_size": 64},
        "pretrained_cfg": {
            "tag": "seen_in21k", "input_size": [3, 64, 64], "crop_pct": 0.9,
            "license": "apache-2.0", "interpolation": "bilinear",
            "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3],
        },
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_a_folder_says_how_its_weights_were_shown_pictures(folder: Path, tmp_path: Path) -> None:
    weights = Pretrained.open(folder)
    recipe = weights.asked(RECIPE)
    assert (recipe.mean, recipe.std) == ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert (recipe.interpolation, recipe.crop_pct) == ("bilinear", 0.9)
    assert recipe.whole == 35
    assert weights.history.saw == [("vit_tiny.seen_in21k (pretrained weights)", "apache-2.0")]
    # And the folder that is written says it on.
    model = classifier.build(recipe)
    pixels = torch.tensor([0.6, 0.7, 0.9])[None, :, None, None]
    assert torch.allclose(classifier.normalized(pixels, model), torch.ones(1, 3, 1, 1))
    calibration = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6]}
    classifier.save(model, recipe, calibration, {}, states.History("x", ()), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert written["mean"] == [0.4, 0.5, 0.6]
    assert (written["crop_pct"], written["interpolation"]) == (0.9, "bilinear")
    again = Pretrained.open(tmp_path / "out")
    assert again.asked(RECIPE) == recipe
    loaded = classifier.load(tmp_path / "out")
    assert torch.allclose(classifier.normalized(pixels, loaded), torch.ones(1, 3, 1, 1))


def test_the_body_is_taken_and_the_head_is_not(
    folder: Path, learnt: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(2)
    model = classifier.build(RECIPE)
    head = model.state_dict()["head.weight"].clone()
    fitted = Pretrained.open(folder).into(model, NAME)
    after = model.state_dict()
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], learnt["blocks.1.mlp.fc1.weight"])
    assert torch.equal(after["head.weight"], head)
    # 64 pixels are 8 x 8 patches and a class token, 32 pixels 4 x 4.
    assert learnt["pos_embed"].shape[1] == 65
    assert after["pos_embed"].shape[1] == 17
    assert fitted.missing == ("head.weight", "head.bias")
    assert fitted.unexpected == fitted.other_shape == ()
    assert fitted.used == len(after) - 2


@pytest.mark.parametrize("kind", ["bare.safetensors", "bare.pth", "nested.pth", "wrapped.bin"])
def test_bare_files_need_a_models_name(
    tmp_path: Path, learnt: dict[str, torch.Tensor], kind: str
) -> None:
    file = tmp_path / kind
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in learnt.items()}, file)
    elif kind == "bare.pth":
        torch.save(learnt, file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in learnt.items()}}, file)
    weights = Pretrained.open(file)
    given = ["--data", "x", "--out", "y", "--pretrained", str(file), "--size", "32"]
    parser = vit_options.parser("vit", "")
    with pytest.raises(DatasetError, match="does not say of which model it is; give --model"):
        vit_options.recipe_of(parser.parse_args(given), weights)
    options = parser.parse_args([*given, "--model", NAME, "--model-args", json.dumps(SMALL)])
    recipe = vit_options.recipe_of(options, weights)
    assert recipe.model_args == {**SMALL, "img_size": 32}
    model = classifier.build(recipe)
    weights.into(model, NAME)
    assert torch.equal(model.state_dict()["cls_token"], learnt["cls_token"])
    assert weights.history.saw[0][1] == ""  # nobody knows the licence


def test_other_weights_are_refused_with_counts(
    folder: Path, tmp_path: Path, learnt: dict[str, torch.Tensor]
) -> None:
    wide = classifier.build(replace(RECIPE, model_args={**SMALL, "embed_dim": 96, "img_size": 32}))
    with pytest.raises(DatasetError, match=r"0 of its 30 .*, 0 are missing, 30 are of another"):
        Pretrained.open(folder).into(wide, NAME)
    convolutional = classifier.build(Recipe(architecture="resnet10t", model_args={}, size=32))
    with pytest.raises(DatasetError, match=r"0 of its .* are there.* 32 of the file's are of no"):
        Pretrained.open(folder).into(convolutional, "resnet10t")
    with pytest.raises(DatasetError, match="are of vit_tiny_patch16_224, not resnet10t"):
        Pretrained.open(folder).asked(Recipe(architecture="resnet10t"))


def test_a_deeper_model_says_what_it_lacks(folder: Path) -> None:
    deep = classifier.build(replace(RECIPE, model_args={**SMALL, "depth": 3, "img_size": 32}))
    before = {name: value.clone() for name, value in deep.state_dict().items()}
    with pytest.raises(
        DatasetError, match=r"12 are missing, 0 are.*lacks blocks\.2\.norm1\.weight.* and 8 more"
    ):
        Pretrained.open(folder).into(deep, NAME)
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())


def test_one_tensor_of_another_shape_or_that_is_not_finite_is_named(
    folder: Path, learnt: dict[str, torch.Tensor]
) -> None:
    model = classifier.build(RECIPE)
    weights = Pretrained.open(folder)
    short = {**weights.tensors, "norm.bias": torch.zeros(5)}
    with pytest.raises(DatasetError, match=r"1 are of another shape.*lacks norm\.bias"):
        replace(weights, tensors=short).into(model, NAME)
    broken = learnt["norm.bias"].clone()
    broken[3] = torch.nan
    with pytest.raises(DatasetError, match=r"not finite in 1 of 30 tensors \(norm\.bias\)"):
        replace(weights, tensors={**weights.tensors, "norm.bias": broken}).into(model, NAME)
    # The head is not taken, whatever is in it.
    headless = {**weights.tensors, "head.bias": torch.full((7,), torch.nan)}
    assert replace(weights, tensors=headless).into(model, NAME).used == 30


def test_weights_of_a_convolutional_net_fit_at_any_size(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("resnet10t", num_classes=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    given: dict[str, Any] = {"architecture": "resnet10t", "num_classes": 5}
    # As timm wrote it before 0.9: settings beside the name.
    (tmp_path / "config.json").write_text(json.dumps({**given, "mean": [0.1, 0.2, 0.3]}))
    weights = Pretrained.open(tmp_path)
    options = vit_options.parser("vit", "").parse_args(
        ["--data", "x", "--out", "y", "--size", "48", "--rate", "0.01"]
    )
    recipe = vit_options.recipe_of(options, weights)
    assert (recipe.architecture, recipe.model_args, recipe.margin) == ("resnet10t", {}, 6)
    assert recipe.mean == (0.1, 0.2, 0.3)
    assert (recipe.rate, recipe.schedule, recipe.layer_decay) == (0.01, "cosine", 0.75)
    fresh = classifier.build(recipe)
    assert weights.into(fresh, "resnet10t").missing == ("fc.weight", "fc.bias")


def test_weights_of_a_net_whose_conversion_takes_no_model_fit(tmp_path: Path) -> None:
    model = timm.create_model("regnetx_002", num_classes=5)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    fresh = timm.create_model("regnetx_002", num_classes=2)
    fitted = Pretrained.open(tmp_path / "bare.safetensors").into(fresh, "regnetx_002")
    assert fitted.missing == ("head.fc.weight", "head.fc.bias")
    assert torch.equal(fresh.state_dict()["stem.conv.weight"], model.stem.conv.weight)


def test_what_are_no_weights_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    torch.save({"code": print}, tmp_path / "code.pth")
    for name, said in (
        ("text.pth", "cannot be read as weights"),
        ("text.safetensors", "cannot be read as weights"),
        ("list.pth", "cannot be read as weights"),
        ("empty.pth", "holds no tensors"),
        ("code.pth", "cannot be read as weights"),
        ("none.pth", "is no folder and no file"),
        ("", r"has no model\.safetensors or pytorch_model\.bin"),
    ):
        with pytest.raises(DatasetError, match=said) as caught:
            Pretrained.open(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("pretrained", True), ("pretrained_cfg", {}), ("pretrained_cfg_overlay", {"file": "x"}),
     ("checkpoint_path", "x.pth"), ("cache_dir", "x")],
)  # fmt: skip
def test_arguments_that_fetch_weights_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("timm was asked")

    monkeypatch.setattr(timm, "create_model", never)
    said = f"have {key}, with which .*nothing is downloaded"
    given = ["--data", "x", "--out", "y"]
    read = vit_options.parser("vit", "").parse_args
    args = ["--model-args", json.dumps({key: value})]
    for options in ([*given, *args], [*given, "--model", "resnet10t", *args]):
        with pytest.raises(RecipeError, match=said):
            vit_options.recipe_of(read(options), None)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=said):
        Pretrained.open(folder)
    with pytest.raises(DatasetError, match=said):
        classifier.load(folder)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet10t.c3_in1k", "local-dir:weights"])
def test_models_that_lie_elsewhere_are_refused(folder: Path, name: str) -> None:
    options = vit_options.parser("vit", "").parse_args(
        ["--data", "x", "--out", "y", "--model", name]
    )
    with pytest.raises(RecipeError, match="lies elsewhere, and nothing is downloaded"):
        vit_options.recipe_of(options, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": name}))
    with pytest.raises(RecipeError, match="lies elsewhere"):
        Pretrained.open(folder)
    with pytest.raises(DatasetError, match="lies elsewhere"):
        classifier.load(folder)
