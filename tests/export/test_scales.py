"""Tables of scales: made once, gone on with, refused where they are of something else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dermaflux.checkpoint import Checkpoint
from dermaflux.errors import BundleError
from dermaflux.hardware import Machine, Memory
from export import calibrate as calibration
from export.__main__ import main as export_main
from export.calibrate import calibrate
from export.quantize import main
from export.reference import read_requests, requests
from export.scales import Scales


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("scales") / "tiny.scales.npz"
    checkpoint = Checkpoint.open(tiny_checkpoint)
    return calibrate(checkpoint, requests(checkpoint, 2, seed=1), path), path


def test_what_is_saved_is_read(made):
    table, path = made
    found = Scales.open(path)
    assert found.done == found.asked == 2
    assert found.models == table.models
    for part, channels in table.parts.items():
        for layer, numbers in channels.items():
            assert np.array_equal(found.parts[part][layer], numbers)
    single = found.parts["transformer"]["single_transformer_blocks.0.attn.to_q"]
    assert single.shape == (32,)
    assert (single > 0).all()
    assert "x_embedder" not in found.parts["transformer"]


def test_a_stopped_calibration_goes_on(made, tiny_checkpoint, tmp_path, monkeypatch):
    whole, _ = made
    checkpoint = Checkpoint.open(tiny_checkpoint)
    asked, path = requests(checkpoint, 2, seed=1), tmp_path / "t.npz"
    first = calibrate(checkpoint, asked[:1])
    replace(first, asked=2, request_set=whole.request_set).save(path)
    with pytest.raises(BundleError, match=r"1 of 2 requests.*go on with it"):
        Scales.open(path).require(tiny_checkpoint, "transformer")
    found = calibrate(checkpoint, asked, path)
    for layer, numbers in whole.parts["transformer"].items():
        assert np.array_equal(found.parts["transformer"][layer], numbers)
    # What is done is read, and no model is opened for it.
    monkeypatch.setattr(calibration.eager, "load", lambda *a, **k: pytest.fail("opened"))
    assert calibrate(checkpoint, asked, path).done == 2


def test_a_table_of_other_weights_is_refused(made, tiny_checkpoint, tmp_path):
    table, _ = made
    table.require(tiny_checkpoint, "transformer")
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="measured on other weights of transformer"):
        table.require(other, "transformer")
    with pytest.raises(BundleError, match="has no vae_decoder"):
        table.require(tiny_checkpoint, "vae_decoder")


@pytest.mark.parametrize("content", [b"", b"PK", b"{}"])
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is no table of scales"):
        Scales.open(path)
    with pytest.raises(BundleError, match="there is no table"):
        Scales.open(tmp_path / "nowhere.npz")


def test_another_version_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr("export.scales.VERSION", 2)
    with pytest.raises(BundleError, match="has version 1, this version reads 2"):
        Scales.open(made[1])


def test_too_large_a_model_is_refused_with_the_command(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    small = Machine(cores=2, ram=Memory(total=2**20, available=2**20, source="test"))
    monkeypatch.setattr(calibration, "look", lambda: small)
    arguments = [str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--precision", "fp32,fp8"]
    assert export_main(arguments) == 2
    assert "comparing in eager torch needs" in (found := capsys.readouterr().err)
    assert "--prompts 0" in found
    assert export_main([*arguments, "--prompts", "0"]) == 2
    found = capsys.readouterr().err
    assert "calibrating in eager torch needs" in found
    assert f"python -m export.quantize --calibrate {tiny_checkpoint}" in found
    assert not list(tmp_path.iterdir())


def test_an_assumed_table_says_so(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "assumed.npz"
    assert main(["--calibrate", str(tiny_checkpoint), "--out", str(out), "--assume", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed"] is True
    table = Scales.open(out)
    assert table.request_set == "assumed"
    assert (table.parts["transformer"]["single_transformer_blocks.0.attn.to_q"] == 8).all()
    table.require(tiny_checkpoint, "transformer")


def test_requests_of_a_file(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a nevus", "seed": 3, "steps": 2}\n\n{"prompt": "a melanoma"}\n')
    first, second = read_requests(checkpoint, path)
    assert (first.prompt, first.seed, first.steps) == ("a nevus", 3, 2)
    assert second.steps == checkpoint.defaults.steps
    for wrong, why in (("{}", "line 1"), ('{"prompt": "x", "steps": 0}', "steps"), ("", "no req")):
        path.write_text(wrong)
        with pytest.raises(BundleError, match=why):
            read_requests(checkpoint, path)


def test_sensitivity_needs_a_table(tiny_checkpoint, capsys):
    assert main(["--sensitivity", str(tiny_checkpoint)]) == 2
    assert "--scales TABLE" in capsys.readouterr().err
