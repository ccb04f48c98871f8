"""Tables of scales: made once, gone on with, refused where they are of something else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager
from dermaflux.errors import BundleError
from dermaflux.hardware import Machine, Memory
from export import calibrate as calibration
from export.__main__ import main as export_main
from export.calibrate import calibrate
from export.offload import offloaded
from export.quantize import main
from export.reference import read_requests, requests
from export.scales import Scales
from export.shapes import Size, examples


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
    # What recipes keep high is known as well, and what attention multiplies.
    assert found.parts["transformer"]["x_embedder"].shape == (16,)
    assert found.parts["transformer"]["transformer_blocks.0.attn.key"].shape == (1,)
    assert set(found.parts) == {*GENERATOR_PARTS, "classifier"}


def test_attention_is_seen_where_it_multiplies(made, tiny_checkpoint, monkeypatch):
    """The largest of a query is that after its norm and its rotation, which keeps lengths."""
    table, _ = made
    largest = table.parts["transformer"]
    for block in ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn"):
        for factor in ("query", "key"):
            # RMS norm: a head of 16 numbers has the length 4, times the norm's weights, here 1.
            assert 0.5 < float(largest[f"{block}.{factor}"][0]) <= 4.001


def test_it_runs_in_bf16_as_well(made, tiny_checkpoint):
    whole, _ = made
    checkpoint = Checkpoint.open(tiny_checkpoint)
    found = calibrate(checkpoint, requests(checkpoint, 2, seed=1), dtype=torch.bfloat16)
    for layer in (
        "x_embedder",
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.attn.key",
    ):
        largest = whole.parts["transformer"][layer]
        np.testing.assert_allclose(found.parts["transformer"][layer], largest, rtol=0.3, atol=0.1)


def test_weights_that_stay_on_the_disk_give_the_same_table(made, tiny_checkpoint, tmp_path):
    whole, _ = made
    checkpoint = Checkpoint.open(tiny_checkpoint)
    asked = requests(checkpoint, 2, seed=1)
    found = calibrate(checkpoint, asked, tmp_path / "t.npz", offload=True, batch=2)
    for part, channels in whole.parts.items():
        assert found.parts[part].keys() == channels.keys()
        for layer, numbers in channels.items():
            np.testing.assert_allclose(found.parts[part][layer], numbers, rtol=1e-4, atol=1e-5)


def test_offloaded_weights_are_not_in_memory(tiny_checkpoint):
    engine = offloaded(tiny_checkpoint, "transformer")
    example = examples(Checkpoint.open(tiny_checkpoint), "transformer", Size(2, 32, 32))
    resident = eager.load(tiny_checkpoint, "transformer").run(example)
    found = engine.run(example)["out_hidden_states"]
    np.testing.assert_allclose(found, resident["out_hidden_states"], rtol=1e-4, atol=1e-5)
    assert all(parameter.is_meta for parameter in engine.model.parameters())


def test_a_shard_that_lacks_a_tensor_is_refused_before_anything_runs(tiny_checkpoint, tmp_path):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    file = other / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="lack proj_out.weight"):
        offloaded(other, "transformer")


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
    with pytest.raises(BundleError, match="has no vae_encoder"):
        table.require(tiny_checkpoint, "vae_encoder")


@pytest.mark.parametrize("content", [b"", b"PK", b"{}"])
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is no table of scales"):
        Scales.open(path)
    with pytest.raises(BundleError, match="there is no table"):
        Scales.open(tmp_path / "nowhere.npz")


def test_a_flipped_bit_is_refused_or_harmless(made, tmp_path):
    whole = made[1].read_bytes()
    random = np.random.default_rng(0)
    path, refused = tmp_path / "flipped.npz", 0
    for place in random.integers(0, len(whole), 60):
        content = bytearray(whole)
        content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        try:
            Scales.open(path)
        except BundleError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"models": None}, "about.models"),
        ({"done": "1"}, "about.done"),
        ({"more": 1}, "unknown key 'more'"),
        ([], "is no table of scales"),
    ],
)
def test_what_a_table_says_of_itself_is_read_strictly(made, tmp_path, change, why):
    with np.load(made[1]) as content:
        arrays = dict(content)
    about = json.loads(str(arrays["about"]))
    about = {**about, **change} if isinstance(change, dict) else change
    np.savez(tmp_path / "t.npz", **{**arrays, "about": np.array(json.dumps(about))})
    with pytest.raises(BundleError, match=why):
        Scales.open(tmp_path / "t.npz")


@pytest.mark.parametrize(
    "array", [np.ones(3), np.ones(3, bool), np.ones((2, 2), np.float32), np.ones(0, np.float32),
              np.array([np.nan], np.float32), np.array([-1], np.float32)],
)  # fmt: skip
def test_what_is_no_range_is_refused(made, tmp_path, array):
    with np.load(made[1]) as content:
        arrays = dict(content)
    np.savez(tmp_path / "t.npz", **{**arrays, "transformer/x_embedder": array})
    with pytest.raises(BundleError, match="transformer/x_embedder holds no ranges"):
        Scales.open(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--prompts", "0"], "--prompts 0 measures nothing"),
        (["--batch", "0"], "--batch 0 measures nothing"),
        (["--seed", "-5"], "--seed -5 is out of range"),
        (["--assume", "nan"], "--assume nan is no range"),
        (["--assume", "0"], "--assume 0.0 is no range"),
        (["--device", "nowhere"], "torch cannot use the device 'nowhere'"),
        (["--device", "meta", "--offload"], "torch cannot use the device 'meta'"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_checkpoint, tmp_path, capsys, options, why):
    out = tmp_path / "t.npz"
    arguments = ["--calibrate", str(tiny_checkpoint), "--out", str(out), *options]
    assert main(arguments) == 2
    assert why in capsys.readouterr().err
    assert not out.exists()


def test_a_table_of_other_requests_is_left_as_it_is(made, tiny_checkpoint, capsys):
    before = made[1].read_bytes()
    arguments = ["--calibrate", str(tiny_checkpoint), "--out", str(made[1]), "--prompts", "1"]
    assert main(arguments) == 2
    assert "other requests (2 of 2 done) and is left as it is" in capsys.readouterr().err
    assert made[1].read_bytes() == before


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


def test_an_assumed_table_says_so(tiny_checkpoint, tmp_path, capsys, caplog):
    out = tmp_path / "assumed.npz"
    assert main(["--calibrate", str(tiny_checkpoint), "--out", str(out), "--assume", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["assumed"] is True
    arguments = [str(tiny_checkpoint), "--out", str(tmp_path / "b"), "--prompts", "0"]
    with caplog.at_level("WARNING"):
        assert export_main([*arguments, "--precision", "fp8", "--calibration", str(out)]) == 0
    assert "are assumed, not measured" in caplog.text
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
    deep = '{"prompt": ' + "[" * 100_000
    for wrong, why in (
        (deep, "line 1"),
        ("{}", "line 1"),
        ('{"prompt": "x", "steps": 0}', "steps"),
        ("", "no req"),
    ):
        path.write_text(wrong)
        with pytest.raises(BundleError, match=why):
            read_requests(checkpoint, path)


@pytest.mark.parametrize(("part", "by"), [("transformer", "block"), ("vae_decoder", "kind")])
def test_sensitivity(made, tiny_checkpoint, tmp_path, capsys, part, by):
    out = tmp_path / "s.json"
    arguments = ["--sensitivity", str(tiny_checkpoint), "--scales", str(made[1]), "--part", part]
    assert main([*arguments, "--by", by, "--prompts", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["name"], row["high"]): row for row in result["blocks"]}
    blocks = [row for row in result["blocks"] if row["name"] != "all"]
    assert sum(row["weights"] for row in blocks) == pytest.approx(1)
    assert [row["error"] for row in blocks] == sorted((r["error"] for r in blocks), reverse=True)
    if part == "transformer":
        assert rows["x_embedder", True]["layers"] == 1
        both = rows["single_transformer_blocks.1", False]
        assert 0 < both["error"] < rows["all", False]["error"] < 0.3
    else:
        # It has no recipe, so there is nothing to be measured as a whole.
        assert ("decoder.up_blocks.*.resnets.*.conv1", True) in rows
        assert all(high for _, high in rows)


def test_sensitivity_needs_a_table(tiny_checkpoint, capsys):
    assert main(["--sensitivity", str(tiny_checkpoint)]) == 2
    assert "--scales TABLE" in capsys.readouterr().err
