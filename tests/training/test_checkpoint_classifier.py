"""What `provenance.json` says of a classifier: data, pretrained weights and generated pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dermaflux.licence import Ingredient, combined
from training import checkpoint, data, generated, resuming, states
from training.mixing import SYNTHETIC
from training.pretrained import Pretrained
from training.recipe import Recipe

FLUX = {"name": "FLUX.1-dev", "kind": "weights", "licence": "flux-1-dev-non-commercial-license",
        "attribution": "Black Forest Labs", "sha256": "ab" * 32, "used_for": "x"}  # fmt: skip
JUDGE = {"name": "HAM10000", "kind": "data", "licence": "CC-BY-NC-4.0", "used_for": "classifier"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder as timm writes it, of a model of one tensor."""
    folder = tmp_path / "resnext50_32x4d.a1_in1k"
    folder.mkdir()
    save_file({"fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    config = {"architecture": "resnext50_32x4d", "pretrained_cfg": {"license": "apache-2.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def real(dataset: Path) -> list[data.Sample]:
    return data.read(dataset, "train")


@pytest.fixture
def made(real: list[data.Sample], tmp_path: Path) -> list[data.Sample]:
    """The same pictures as a generator would have made them, with the manifest of their dataset."""
    folder = tmp_path / "flux-synthetic"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("")
    (folder / "manifest.json").write_text(json.dumps({"ingredients": [FLUX, JUDGE]}))
    return [
        replace(one, file=folder / "images" / "train" / one.file.name, confirmed=SYNTHETIC,
                source="DermaFlux, bundle flux", licence="LicenseRef-FLUX.1-dev-NC",
                attribution="Black Forest Labs")
        for one in real
    ]  # fmt: skip


def _stated(folder: Path, history: states.History) -> dict[str, dict[str, Any]]:
    """The classifier's entries by name, as they are written beside another part's."""
    other = {"name": "X", "kind": "data", "licence": "CC0-1.0", "used_for": "generator"}
    old = {"name": "old", "kind": "data", "licence": "CC0-1.0", "used_for": "classifier"}
    (folder / "provenance.json").write_text(json.dumps({"ingredients": [other, old]}))
    checkpoint.add_classifier(folder, history.saw, history.made_of, history.begun)
    listed = json.loads((folder / "provenance.json").read_text())["ingredients"]
    assert listed[0] == other
    assert {one["used_for"] for one in listed[1:]} == {"classifier"}
    assert all(set(one) >= {"name", "kind", "licence", "attribution"} for one in listed[1:])
    return {one["name"]: one for one in listed[1:]}


def _terms(stated: dict[str, dict[str, Any]]) -> str:
    return combined(Ingredient.of(one) for one in stated.values()).licence


def test_from_random_weights(real: list[data.Sample], tmp_path: Path) -> None:
    stated = _stated(tmp_path, resuming.check(real, Recipe(), None))
    assert [(one["kind"], one["licence"]) for one in stated.values()] == [
        ("weights", "Apache-2.0"), ("data", "CC0-1.0")
    ]  # fmt: skip
    assert stated["classifier weights"]["attribution"] == "trained from random weights"
    assert "drawn, training split" in stated
    assert _terms(stated) == ""


def test_from_pretrained_weights(real: list[data.Sample], weights: Path, tmp_path: Path) -> None:
    history = resuming.check(real, Recipe(), None, weights=Pretrained.open(weights))
    assert states.History.of(history.state()).made_of == history.made_of
    stated = _stated(tmp_path, history)
    assert list(stated) == ["classifier weights", "drawn, training split", weights.name]
    content = (weights / "model.safetensors").read_bytes()
    assert stated[weights.name] == {
        "name": weights.name, "kind": "weights", "licence": "apache-2.0",
        "attribution": weights.name, "sha256": hashlib.sha256(content).hexdigest(),
        "used_for": "classifier",
    }  # fmt: skip
    assert stated["classifier weights"]["attribution"] == f"fine-tuned from {weights.name}"
    assert _terms(stated) == ""


def test_weights_of_no_stated_licence(
    real: list[data.Sample], weights: Path, tmp_path: Path
) -> None:
    opened = Pretrained.open(weights / "model.safetensors")
    stated = _stated(tmp_path, resuming.check(real, Recipe(), None, weights=opened))
    assert stated["model.safetensors"]["licence"] == "unknown"
    licence = stated["classifier weights"]["licence"]
    assert licence == "unknown: model.safetensors states no licence"
    terms = combined(Ingredient.of(one) for one in stated.values())
    assert (terms.licence, terms.uses) == ("unknown", ())


def test_generated_pictures_and_what_made_them(
    real: list[data.Sample], made: list[data.Sample], tmp_path: Path
) -> None:
    stated = _stated(tmp_path, resuming.check([*real, *made], Recipe(), None))
    pictures = stated["DermaFlux, bundle flux, synthetic pictures"]
    assert (pictures["kind"], pictures["licence"]) == ("data", "LicenseRef-FLUX.1-dev-NC")
    assert pictures["attribution"] == "Black Forest Labs"
    base = stated["FLUX.1-dev"]
    assert (base["kind"], base["sha256"]) == ("weights", FLUX["sha256"])
    assert base["through"] == "DermaFlux, bundle flux"
    # The generator's own classifier chose among pictures; and no base was fine-tuned here.
    assert "HAM10000" not in stated
    assert stated["classifier weights"]["attribution"] == "trained from random weights"
    assert stated["classifier weights"]["licence"] == _terms(stated) == "LicenseRef-FLUX.1-dev-NC"
    assert len(stated) == 4


def test_a_manifest_that_is_none_is_said(
    made: list[data.Sample], caplog: pytest.LogCaptureFixture
) -> None:
    (made[0].file.parents[2] / "manifest.json").write_text("[")
    assert [one["name"] for one in generated.ingredients(made)] == [
        "DermaFlux, bundle flux, synthetic pictures"
    ]
    assert "what made these pictures is not told" in caplog.text


def test_it_is_told_of_all_runs_before(
    real: list[data.Sample], made: list[data.Sample], weights: Path, tmp_path: Path
) -> None:
    """A run that began with another's state, and one with the folder that such a run wrote."""
    first = resuming.check(made, Recipe(), None, weights=Pretrained.open(weights))
    state = tmp_path / "first.pt"
    states.write(state, {"history": first.state()})
    second = resuming.check(real, Recipe(), None, start=state)
    stated = _stated(tmp_path, second)
    assert set(stated) == {"classifier weights", "drawn, training split", weights.name,
                           "DermaFlux, bundle flux, synthetic pictures", "FLUX.1-dev"}  # fmt: skip
    assert stated["classifier weights"]["attribution"] == f"fine-tuned from {weights.name}"
    (weights / "report.json").write_text(json.dumps(second.document()))
    third = resuming.check(real, Recipe(), None, weights=Pretrained.open(weights))
    again = _stated(tmp_path, third)
    assert set(again) == set(stated)
    assert again["FLUX.1-dev"] == stated["FLUX.1-dev"]
    assert _terms(again) == "LicenseRef-FLUX.1-dev-NC"


def test_what_older_runs_saved_is_no_data(tmp_path: Path) -> None:
    """Their states and reports know of pretrained weights by a pair alone."""
    pair = (f"vit_tiny{states.PRETRAINED}", "apache-2.0")
    state = states.History("b", (("ISIC", "CC0-1.0"),), start=states.History("a", (pair,))).state()
    del state["ingredients"], state["start"]["ingredients"]
    stated = _stated(tmp_path, states.History.of(state))
    assert list(stated) == ["classifier weights", "ISIC, training split", "vit_tiny"]
    assert stated["vit_tiny"]["kind"] == "weights"
    assert stated["classifier weights"]["attribution"] == "fine-tuned from vit_tiny"
