"""A checkpoint with another classifier: it opens, equal seeds are equal weights, and it says what
it is."""

from __future__ import annotations

import json

from benchmarks.classifiers import main
from dermaflux.checkpoint import Checkpoint

SMALL = "test_vit4"


def make(tiny_checkpoint, out, *more):
    return main([SMALL, "--out", str(out), "--base", str(tiny_checkpoint), *more])


def test_a_checkpoint_of_another_classifier(tiny_checkpoint, tmp_path, capsys):
    assert make(tiny_checkpoint, tmp_path / "one") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    opened = Checkpoint.open(made["path"])
    assert made["architecture"] == SMALL
    assert opened.classifier is not None
    assert opened.classifier.intake is None
    assert "random" in opened.provenance["base"]
    assert opened.model == Checkpoint.open(tiny_checkpoint).model
    again = make(tiny_checkpoint, tmp_path / "two")
    other = make(tiny_checkpoint, tmp_path / "three", "--seed", "1")
    weights = [
        (tmp_path / name / "classifier/model.safetensors").read_bytes()
        for name in ("one", "two", "three")
    ]
    assert (again, other) == (0, 0)
    assert weights[0] == weights[1] != weights[2]


def test_what_is_there_stays_and_what_is_unknown_is_said(tiny_checkpoint, tmp_path, capsys):
    assert make(tiny_checkpoint, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["vit_of_nobody", "--out", str(tmp_path / "new")]) == 2
    assert "vit_of_nobody" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
