"""`python -m dermaflux generate --engine eager`: a checkpoint runs with its own settings."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from dermaflux.__main__ import main
from dermaflux.pipeline import Pipeline

WORDS = ("generate", "--prompt", "malignant lesion, black", "--engine", "eager")


def test_a_checkpoint_without_a_bundle(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ("--checkpoint", str(tiny_checkpoint))
    assert main([*WORDS, *checkpoint, "--seed", "7", "--out", "a.png"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["seed"] == "7"
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint)
    (pixels,) = pipeline.generate([pipeline.request(WORDS[2], seed=7)])
    assert np.array_equal(np.asarray(Image.open("a.png")), pixels)
    assert main([*WORDS, *checkpoint, "--residency", "in-turns", "--out", "b.png"]) == 2
    assert "error: --residency: needs --bundle" in capsys.readouterr().err


def test_a_bundle_of_another_model_is_refused(tiny_checkpoint, tiny_bundle, tmp_path, capsys):
    both = ("--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle.path))
    assert main([*WORDS, *both, "--out", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --checkpoint: ")
    assert said.count("\n") == 1
    assert "text_length 24 there, 16 here" in said
    assert "Leave --bundle out" in said
    assert not list(tmp_path.iterdir())
