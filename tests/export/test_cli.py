"""The command: wrong settings, refusals, and what it prints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

import export.__main__ as command
from dermaflux.checkpoint import Checkpoint
from export import parity
from export.__main__ import main
from export.compare import whole
from export.reference import Reference, requests


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--precision", "fp32,fp7"],
            "--precision 'fp7' is not known; use fp32, bf16, fp16, int8, fp8",
        ),
        (["--engines", "abacus"], "--engines 'abacus' is not known; use openvino-cpu"),
        (["--precision", ","], "--precision and --engines need a name each"),
        (["--parts", "unet"], "--parts 'unet' is not known"),
        (["--parts", "transformer,vae_decoder"], "--parts lacks text_encoder, text_encoder_2"),
        (["--prompts", "-1"], "--prompts -1 is less than none"),
    ],
)
def test_wrong_settings_are_one_sentence(tiny_checkpoint, tmp_path, capsys, arguments, sentence):
    out = tmp_path / "bundle"
    assert main([str(tiny_checkpoint), "--out", str(out), *arguments]) == 2
    found = capsys.readouterr()
    assert sentence in found.err
    assert found.err.count("\n") == 1
    assert not found.out
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "bundle")]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_is_asked_for_must_be_there(tiny_checkpoint, tmp_path, capsys):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(checkpoint / "classifier")
    parts = "text_encoder,text_encoder_2,transformer,vae_decoder,classifier"
    assert main([str(checkpoint), "--out", str(tmp_path / "bundle"), "--parts", parts]) == 2
    assert "classifier/config.json is missing" in capsys.readouterr().err


def test_the_last_line_is_json(exported, tiny_checkpoint, tmp_path, capsys, monkeypatch):
    def fill(folder, settings, checkpoint, parts):
        shutil.copytree(exported.path, folder, dirs_exist_ok=True)

    monkeypatch.setattr(command, "_fill", fill)
    out = tmp_path / "bundle"
    assert main([str(tiny_checkpoint), "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"path", "id", "seconds", "parity"}
    assert result["path"] == str(out)
    assert result["id"] == exported.id
    assert result["parity"]["images"]["int8"]["openvino-cpu"]["psnr_median_db"] > 30


def test_a_refused_export_leaves_the_earlier_bundle(
    exported, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(exported.path, tmp_path / "bundle")

    def fill(folder, settings, checkpoint, parts):
        (folder / "half").write_text("")
        parity.require([parity.Row("images", "int8", "openvino-cpu", 12, 30, "dB", True)])

    monkeypatch.setattr(command, "_fill", fill)
    assert main([str(tiny_checkpoint), "--out", str(out)]) == 1
    found = capsys.readouterr()
    assert "FAIL" in found.err
    assert not found.out
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "bundle.json").read_bytes() == (exported.path / "bundle.json").read_bytes()


def test_images_beyond_tolerance_are_refused(exported, tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    asked = requests(checkpoint, 2, seed=3)
    reference = Reference.make(checkpoint, tuple(exported.parts), asked)
    _, golden, rows = whole(exported.path, ("fp32", "int8"), checkpoint, reference)
    parity.require(rows)
    assert golden.tolerance_db <= 30

    other = replace(reference, images=[255 - image for image in reference.images])
    _, _, rows = whole(exported.path, ("fp32",), checkpoint, other)
    with pytest.raises(parity.ParityError, match=r"FAIL images, median +fp32 +openvino-cpu"):
        parity.require(rows)
