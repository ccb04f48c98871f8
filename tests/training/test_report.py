"""A whole report of tiny weights: made, made again from what is kept, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dermaflux.errors import DermaFluxError
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import caption
from training import (
    autoencoder,
    checkpoint,
    classifier,
    data,
    distillation,
    drawing,
    generator,
    judge,
    mini,
    report,
    states,
    words,
)  # fmt: skip

TINY = generator.Architecture(
    double_layers=1, single_layers=1, heads=1, head_width=16, rope_axes=(4, 6, 6),
    text_width=32, text_layers=1, text_length=24, vocabulary=320,
)  # fmt: skip
RECIPE = classifier.Recipe(
    model_args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    size=32,
)
KNOWN = {
    "test_images": 6,
    "psnr_db": {"encode_decode": 29.4, "decode_exact_latents": 32.0, "linear_ceiling": 35.0},
}


@pytest.fixture(scope="module")
def weights(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder: `checkpoint` (untrained), its teacher `generator.pt`, and a `judge`."""
    folder = tmp_path_factory.mktemp("report")
    samples = data.read(dataset)
    clip, t5 = (
        words.train_tokenizer(
            [caption(s.lesion) for s in samples], length=24, vocabulary=320, begin=begin
        )
        for begin in (True, False)
    )
    torch.manual_seed(0)
    model = generator.Generator(TINY)
    torch.save({"average": model.state_dict()}, folder / "generator.pt")
    provenance = {
        "name": "tiny",
        "defaults": {"steps": 2, "guidance": 3.0, "height": 64, "width": 64, "text_length": 24},
        "training": {
            "architecture": {**vars(TINY), "rope_axes": list(TINY.rope_axes)},
            "phases": {},
        },
    }
    vae = autoencoder.build((8, 8, 8, 8))
    checkpoint.write(folder / "checkpoint", model, vae, clip, t5, provenance)
    calibration = {"temperature": 1.0, "threshold": 0.5, "abstain": [0.4, 0.6]}
    history = states.History("judge", tuple(data.licences(samples)))
    classifier.save(classifier.build(RECIPE), RECIPE, calibration, {}, history, folder / "judge")
    return folder


def test_a_whole_report(dataset: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = report.Plan(
        dataset, weights / "checkpoint", weights / "judge", weights,
        first=weights / "checkpoint", samples=2,
    )  # fmt: skip
    text = report.make(plan, KNOWN)
    document = json.loads((plan.checkpoint / "report.json").read_text())
    lines = {line["key"]: line for line in document["figures"]}
    assert document["psnr_db"] == KNOWN["psnr_db"]
    assert lines["autoencoder"]["met"] is False
    assert document["goals"]["of"] == sum(line["met"] is not None for line in lines.values())
    assert all(line["what"] in text for line in lines.values())
    assert document["judge"]["saw"] == ["drawn"]
    # Older weights that are the same weights are as far from real images.
    assert lines["kid.first"]["value"] == lines["kid"]["value"]
    # An untrained student is its teacher but for float16: without guidance both say the same.
    assert lines["distilled"]["beside"]["distilled error at 1"] < 0.05

    def never(*_: object) -> None:
        raise AssertionError("drew an image that it has")

    monkeypatch.setattr(Pipeline, "generate", never)
    monkeypatch.setattr(generator, "guided", never)
    (weights / "generator.pt").rename(weights / "elsewhere.pt")
    again = report.Plan(dataset, plan.checkpoint, plan.judge, weights, samples=2)
    try:
        report.make(again, KNOWN)
    finally:
        (weights / "elsewhere.pt").rename(weights / "generator.pt")
    later = {
        line["key"]: line
        for line in json.loads((plan.checkpoint / "report.json").read_text())["figures"]
    }
    for key, line in lines.items():
        assert later[key]["value"] == line["value"]
    assert "kept" in later["distilled"]["note"]
    assert "kept" in later["kid.first"]["note"]


def test_a_stopped_run_draws_only_what_is_missing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_checkpoint(weights / "checkpoint")
    asked = [("dermoscopic image of a benign lesion", seed) for seed in range(40)]
    first = drawing.sampled(pipeline, asked[:32], tmp_path)
    drawn: list[int] = []
    generate = Pipeline.generate

    def counted(self: Pipeline, requests: list[object]) -> object:
        drawn.append(len(requests))
        return generate(self, requests)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "generate", counted)
    whole = drawing.sampled(pipeline, asked, tmp_path)
    assert drawn == [8]
    assert np.array_equal(whole[:32], first)
    drawing.sampled(pipeline, asked[:8], tmp_path, guidance=1.0)
    assert drawn == [8, 8]  # another guidance is another image


def test_a_teacher_of_other_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    settings = vars(TINY)
    other = generator.Generator(TINY)
    torch.save({"average": other.state_dict()}, tmp_path / "other.pt")
    distillation.teacher_of(weights / "generator.pt", weights / "checkpoint", settings)
    with pytest.raises(data.DatasetError, match="another training run"):
        distillation.teacher_of(tmp_path / "other.pt", weights / "checkpoint", settings)
    (tmp_path / "half.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:999])
    with pytest.raises(data.DatasetError, match="cannot be used as a state"):
        distillation.teacher_of(tmp_path / "half.pt", weights / "checkpoint", settings)
    with pytest.raises(data.DatasetError, match="is missing"):
        distillation.teacher_of(tmp_path / "none.pt", weights / "checkpoint", settings)


def test_labels_are_judged_against_the_judge_itself() -> None:
    random = np.random.default_rng(0)
    asked = np.arange(200) % 2 == 1
    good, none = random.normal(asked * 1.5, 1), random.normal(size=200)
    own, clear, lost = judge.label_figures(
        (good, asked), {"clear": (good, asked), "lost": (none, asked)}
    )
    assert own.goal is None
    assert (clear.value, clear.met) == (1, True)
    assert "exaggerates" in clear.note
    assert lost.value is not None
    assert lost.value < 0.75
    assert lost.met is False
    _, blind = judge.label_figures((good, ~asked), {"clear": (good, asked)})
    assert blind.value is None
    assert blind.met is False
    assert "chance" in blind.note


def test_a_missing_judge_is_said(dataset: Path, weights: Path, tmp_path: Path) -> None:
    plan = report.Plan(dataset, weights / "checkpoint", tmp_path / "judge", tmp_path)
    with pytest.raises(data.DatasetError, match=r"python -m training\.vit"):
        report.make(plan, KNOWN)


def _copy(source: Path, target: Path, **changed: object) -> Path:
    """A folder with the same files, and these JSON files in place of its own."""
    shutil.copytree(source, target)
    for name, content in changed.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


def test_what_cannot_be_reported_on_is_refused_before_drawing(
    dataset: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("drew an image")

    monkeypatch.setattr(report, "sampled", never)
    plan = report.Plan(dataset, weights / "checkpoint", weights / "judge", tmp_path, samples=2)
    bad_judge = _copy(plan.judge, tmp_path / "judge", report=["saw"])
    with pytest.raises(data.DatasetError, match="is no whole classifier"):
        report.make(replace(plan, judge=bad_judge), KNOWN)
    with pytest.raises(DermaFluxError, match="first"):
        report.make(replace(plan, first=tmp_path / "first"), KNOWN)
    provenance = json.loads((plan.checkpoint / "provenance.json").read_text())
    del provenance["training"]
    unknown = _copy(plan.checkpoint, tmp_path / "unknown", provenance=provenance)
    with pytest.raises(data.DatasetError, match="does not say how the generator was trained"):
        report.make(replace(plan, checkpoint=unknown), KNOWN)
    lines = (dataset / "metadata.jsonl").read_text().splitlines(keepends=True)
    one_class = tmp_path / "one_class"
    one_class.mkdir()
    benign = "".join(line for line in lines if json.loads(line)["label"] == "benign")
    (one_class / "metadata.jsonl").write_text(benign)
    with pytest.raises(data.DatasetError, match="has benign lesions alone in split 'test'"):
        report.make(replace(plan, dataset=one_class), KNOWN)


def test_assembling_keeps_the_report_of_the_same_weights_alone(
    weights: Path, tmp_path: Path
) -> None:
    folder = _copy(weights / "checkpoint", tmp_path / "checkpoint")
    mine = drawing.fingerprint(folder)
    for stated, kept in ((mine, True), ("other", False)):
        (folder / "report.json").write_text(json.dumps({"weights": stated, "figures": [1]}))
        mini.write_figures({"test_images": 6}, folder)
        found = json.loads((folder / "report.json").read_text())
        assert (found["weights"], found["test_images"]) == (mine, 6)
        assert ("figures" in found) is kept
