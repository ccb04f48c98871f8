"""The doctor: what is wrong with a bundle or a machine is found, named, and told to programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux import doctor, golden
from dermaflux.__main__ import main
from dermaflux.bundle import Bundle, Data, sha256
from dermaflux.doctor import examine
from dermaflux.engines import fake
from dermaflux.errors import BundleError, EngineError
from dermaflux.hardware import Machine, Memory
from dermaflux.pipeline import Pipeline
from tests.tiny_bundle import write_bundle

ENGINE = "onnxruntime-cpu"
HERE = Machine(2, Memory(10**10, 10**10, "test"), no_gpu="none")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of one's own, to be damaged."""
    return write_bundle(tmp_path / "bundle")


def with_golden(folder: Path, steps: int = 2) -> Bundle:
    """A bundle whose golden image is one that it makes."""
    bundle = Bundle.open(folder)
    request = {"prompt": "benign lesion", "seed": 3, "steps": steps}
    pipeline = Pipeline.open(bundle, engine=ENGINE, precision="fp32", threads=1)
    (pixels,) = pipeline.generate([pipeline.request(**request)])
    Image.fromarray(pixels).save(folder / "golden.png")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["golden"]["request"] = request
    image = folder / "golden.png"
    for entry in manifest["files"]:
        if entry["path"] == "golden.png":
            entry |= {"bytes": image.stat().st_size, "sha256": sha256(image)}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def about(report: doctor.Report, name: str) -> list[tuple[str, str]]:
    return [(f.state, f.words) for f in report.findings if f.about == name]


def test_a_whole_bundle_is_healthy(folder):
    report = examine(folder, ENGINE, "fp32", machine=HERE)
    assert report.healthy
    assert report.id == Bundle.open(folder).id
    assert {choice.part for choice in report.choices} == set(Bundle.open(folder).parts)
    assert about(report, "licence") == [("ok", "tiny: Apache-2.0 (nobody)")]
    assert about(report, "memory")[0][0] == "ok"
    assert about(report, "golden") == [("note", "golden.png is there; make it again with --golden")]
    assert about(report, "device") == [("ok", "no NVIDIA GPU: none")]


def test_a_flipped_bit_is_named(folder):
    graph = folder / "vae_decoder/model.onnx"
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    report = examine(folder, ENGINE, machine=HERE)
    assert not report.healthy
    ((state, words),) = about(report, "files")
    assert state == "fail"
    assert "vae_decoder/model.onnx is not what was exported" in words


def test_what_cannot_be_opened_is_a_finding(tmp_path):
    report = examine(tmp_path, machine=HERE)
    assert not report.healthy
    assert "has no bundle.json" in about(report, "bundle")[0][1]
    assert report.versions["dermaflux"]


def test_too_little_memory_is_a_finding_with_figures(folder):
    small = replace(HERE, ram=Memory(10**6, 10**6, "test"))
    report = examine(folder, ENGINE, machine=small)
    ((state, words),) = about(report, "memory")
    assert state == "fail"
    assert "has 1 MB free of 1 MB" in words
    unknown = examine(folder, ENGINE, machine=replace(HERE, ram=None))
    assert about(unknown, "memory")[0][0] == "note"


def test_engines_that_are_not_here_are_named_once(folder):
    report = examine(folder, machine=HERE)
    words = [words for _, words in about(report, "engine")]
    assert words.count("not tensorrt: none") == 1
    assert len(words) == len(set(words))


def test_an_engine_that_cannot_be_had_fails(folder):
    report = examine(folder, "onnxruntime-cuda", machine=HERE)
    assert not report.healthy
    assert "onnxruntime-cuda: none" in about(report, "transformer")[0][1]


def test_the_golden_image_is_made_again(folder):
    bundle = with_golden(folder)
    report = examine(folder, ENGINE, "fp32", golden=True, machine=HERE)
    assert about(report, "golden") == [("ok", "PSNR 99.0 dB, needs at least 30 dB")]
    assert report.healthy

    Image.new("RGB", (64, 64), "white").save(folder / "golden.png")
    pipeline = Pipeline.open(bundle, engine=ENGINE, precision="fp32", threads=1)
    found = golden.check(bundle, pipeline)
    assert found is not None
    assert not found.passed
    Image.new("RGB", (64, 32)).save(folder / "golden.png")
    with pytest.raises(BundleError, match="has the shape"):
        golden.check(bundle, pipeline)
    assert golden.check(replace(bundle, golden=None), pipeline) is None
    odd = replace(bundle.golden, request={"prompt": "x", "sampler": "ddim"})
    with pytest.raises(BundleError, match="cannot be made again"):
        golden.check(replace(bundle, golden=odd), pipeline)


@dataclass(frozen=True)
class Noted(fake.Fake):
    note: str = "what is not in 8 bits is in bf16"


def test_what_the_classifiers_engine_says_is_told_where_engines_are_opened(folder, monkeypatch):
    with_golden(folder)

    def say(words: str) -> list[tuple[str, str]]:
        monkeypatch.setattr(doctor, "load", lambda *_, **__: Noted(dict, note=words))
        return about(examine(folder, ENGINE, "fp32", golden=True, machine=HERE), "classifier")[1:]

    assert say("in bf16") == [("note", "in bf16")]
    assert say("") == []
    shut = examine(folder, ENGINE, "fp32", machine=HERE)
    assert len(about(shut, "classifier")) == 1

    def broken(*_, **__):
        raise EngineError("no graph of mine")

    monkeypatch.setattr(doctor, "load", broken)
    report = examine(folder, ENGINE, "fp32", golden=True, machine=HERE)
    assert ("fail", "no graph of mine") in about(report, "classifier")
    assert not report.healthy


def test_the_golden_image_is_about_engines_and_not_about_steps_that_are_forecast(
    folder, monkeypatch
):
    monkeypatch.setattr("dermaflux.forecast.MOST_ERROR", 1e9)
    bundle = with_golden(folder, steps=20)
    pipeline = Pipeline.open(bundle, engine=ENGINE, precision="fp32", tier="cached", threads=1)
    assert pipeline.forecasts
    (near,) = pipeline.generate([pipeline.request(**bundle.golden.request)])
    with Image.open(folder / "golden.png") as stored:
        assert golden.psnr(near, np.asarray(stored)) < golden.EQUAL_DB, "forecast, and not the same"
    found = golden.check(bundle, pipeline)
    assert found is not None
    assert found.psnr_db == golden.EQUAL_DB
    assert pipeline.forecasts, "the next image is drawn in its tier"


def test_only_what_runs_is_hashed(folder):
    bundle = Bundle.open(folder)
    report = examine(folder, ENGINE, "int8", machine=HERE)
    chosen = {data.path for data in doctor.files_of(bundle, report.choices)}
    assert "transformer/model_int8.onnx" in chosen
    assert "transformer/model.onnx" not in chosen
    assert chosen < {data.path for data in doctor.files_of(bundle)}
    wrong = Data("golden.png", 0, "0" * 64)
    assert doctor.damaged(bundle, [wrong, *doctor.files_of(bundle)]) == ["golden.png"]
    assert doctor.damaged(bundle, []) == []


def test_the_command_tells_people_and_programs(folder, capsys):
    assert main(["doctor", str(folder), "--engine", ENGINE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert {finding["state"] for finding in found["findings"]} <= {"ok", "note", "fail"}
    assert [choice["engine"] for choice in found["choices"]] == [ENGINE] * len(found["choices"])
    assert main(["doctor", str(folder / "absent")]) == 1
    out = capsys.readouterr().out
    assert "fail bundle" in out
    assert "there is no bundle at" in out
