"""What a checkpoint says of itself; FLUX.1 as downloaded says less, and is read too."""

from __future__ import annotations

import json
import shutil

import pytest

from dermaflux.bundle import Defaults, Limits, ModelSpec
from dermaflux.checkpoint import UNKNOWN_LICENCE, Checkpoint
from dermaflux.errors import BundleError


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """The JSON files alone: weights are not read."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny", ignore=ignore)


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_checkpoint_with_provenance_is_read(folder):
    found = Checkpoint.open(folder)
    assert found.model == ModelSpec(4, 4, 0.5, 0.1, 24, 20, guidance_embeds=True)
    assert found.defaults == Defaults(3, 2.5, 32, 32)
    assert found.limits == Limits(16, 64, 8, 100, 8)
    assert found.classifier.abstain == (0.3, 0.5)
    assert found.provenance["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("guided", "length", "defaults"),
    [(True, 512, Defaults(28, 3.5, 1024, 1024)), (False, 256, Defaults(4, None, 1024, 1024))],
)
def test_without_provenance_the_model_says_what_it_is(folder, guided, length, defaults):
    (folder / "provenance.json").unlink()
    shutil.rmtree(folder / "classifier")
    edit(folder / "transformer/config.json", guidance_embeds=guided)
    found = Checkpoint.open(folder)
    assert found.model.text_length == length
    assert found.defaults == defaults
    assert found.classifier is None
    assert (found.provenance["name"], found.provenance["licence"]) == ("tiny", UNKNOWN_LICENCE)


def test_what_is_no_flux_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(BundleError, match="it has no model_index.json"):
        Checkpoint.open(tmp_path)
    edit(folder / "vae/config.json", scaling_factor=None)
    with pytest.raises(BundleError, match="vae/config.json has no key 'scaling_factor'"):
        Checkpoint.open(folder)
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Checkpoint.open(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(BundleError, match="a StableDiffusionPipeline, not a FluxPipeline"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"defaults": {"steps": "20"}}, "defaults.steps needs an integer"),
        ({"defaults": {"step": 20}}, "unknown key 'step'"),
        ({"defaults": [20]}, "defaults needs an object"),
        ({"name": None}, "no key 'name'"),
    ],
)
def test_a_provenance_that_says_it_wrongly_is_refused(folder, changes, sentence):
    edit(folder / "provenance.json", **changes)
    with pytest.raises(BundleError, match=sentence):
        Checkpoint.open(folder)


def test_a_classifier_that_we_would_read_wrongly_is_refused(folder):
    path = folder / "classifier/config.json"
    config = json.loads(path.read_text())
    edit(path, pretrained_cfg={**config["pretrained_cfg"], "crop_mode": "squash"})
    with pytest.raises(BundleError, match="crop_mode 'squash' is not supported"):
        Checkpoint.open(folder)
    edit(path, pretrained_cfg=config["pretrained_cfg"], dermaflux={"temperature": 1.0})
    with pytest.raises(BundleError, match="no key 'threshold'"):
        Checkpoint.open(folder)
