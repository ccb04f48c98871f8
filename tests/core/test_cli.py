"""`python -m dermaflux`: files, JSON lines, and errors in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dermaflux.__main__ import main
from dermaflux.images import read_marks
from tests.tiny_bundle import write_bundle


@pytest.fixture
def run(tiny_bundle, capsys):
    """Runs a command on the tiny bundle: status, JSON lines, stderr."""

    def command(verb, *arguments):
        status = main([verb, "--bundle", str(tiny_bundle.path), *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return command


def test_one_image_into_a_file(run, tiny_bundle, tmp_path):
    file = tmp_path / "new" / "lesion.png"
    arguments = ("--label", "malignant", "--diagnosis", "melanoma", "--colors", "black,dark brown")
    status, (line,), err = run("generate", *arguments, "--seed", 7, "--out", file)
    assert (status, err) == (0, "")
    assert line["file"] == str(file)
    prompt = "dermoscopic image of a malignant lesion, melanoma, dark brown and black"
    marks = read_marks(file.read_bytes())
    assert (marks["dermaflux.prompt"], marks["dermaflux.seed"]) == (prompt, "7")
    assert marks["dermaflux.bundle"] == tiny_bundle.id
    assert [path.name for path in file.parent.iterdir()] == ["lesion.png"]


def test_several_images_count_their_seeds(run, tmp_path):
    arguments = ("--prompt", "benign lesion", "--height", 32, "--steps", 2, "--seed", 5)
    status, lines, _ = run("generate", *arguments, "--count", 10, "--out", tmp_path)
    assert status == 0
    assert [line["seed"] for line in lines] == [str(seed) for seed in range(5, 15)]
    assert len(list(tmp_path.iterdir())) == 10
    _, (alone,), _ = run("generate", *arguments, "--out", tmp_path / "x.png")
    assert np.array_equal(Image.open(lines[0]["file"]), Image.open(alone["file"]))
    run("generate", *arguments, "--guidance", 1, "--out", tmp_path)
    assert len(list(tmp_path.iterdir())) == 12


def test_a_long_prompt_is_noted(run, tmp_path):
    _, _, err = run("generate", "--prompt", "lesion " * 30, "--out", tmp_path)
    assert "30 tokens; 16 are read" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prompt", "x", "--label", "benign"), "--prompt: cannot go with --label"),
        (("--label", "bad"), "lesion.label: 'bad' is not known"),
        ((), "lesion.label: is missing"),
        (("--prompt", "x", "--steps", "0"), "steps: 0 is out of range; use 1 to 20"),
        (("--prompt", "x", "--guidance", "nan"), "guidance: nan is out of range"),
        (("--prompt", "x", "--count", "2", "--out", "a.png"), "name a folder"),
        (("--prompt", "x", "--precision", "int4"), "precision 'int4' is not in"),
        (("--prompt", "x", "--tier", "fp8"), "tier 'fp8' needs transformer in fp8, and"),
        (("--prompt", "x", "--tier", "int8", "--precision", "fp32"), "contradicts tier 'int8'"),
        (("--prompt", "x", "--engine", "eager"), "--checkpoint: is missing; --engine eager runs"),
        (("--prompt", "x", "--checkpoint", "c"), "--checkpoint: goes with --engine eager only"),
        (("--prompt", "x", "--device", "cuda"), "device 'cuda' cannot be chosen"),
        (("--prompt", "x", "--engine", "tensorrt"), "engine tensorrt needs tensorrt"),
        (("--prompt", "x", "--engine", "onnxruntime-cuda"), "no engine can run text_encoder"),
        (("--prompt", "x", "--bundle", "nowhere"), "there is no bundle at nowhere"),
        (("--prompt", "x", "--seed", str(2**53 - 1), "--count", "2"), "leaves no room"),
    ],
)
def test_errors_are_one_sentence(run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, lines, err = run("generate", "--out", "out", *arguments)
    assert (status, lines) == (2, [])
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", ["0", "-1", "x", "1.5"])
def test_numbers_that_make_no_sense_are_refused(run, capsys, tmp_path, threads):
    with pytest.raises(SystemExit) as stop:
        run("generate", "--prompt", "x", "--out", tmp_path, "--threads", threads)
    assert stop.value.code == 2
    assert "is not an integer above 0" in capsys.readouterr().err


def test_a_file_in_the_way_is_an_error(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    status, _, err = run("generate", "--prompt", "x", "--out", tmp_path / "out")
    assert (status, err) == (
        2,
        f"error: --out: {tmp_path / 'out'} is a file; name a folder, or one file.png\n",
    )
    (tmp_path / "a.png").mkdir()
    status, _, err = run("generate", "--prompt", "x", "--out", tmp_path / "a.png")
    assert status == 2
    assert "a.png is a folder" in err


def test_a_checkpoint_is_not_taken_for_a_bundle(run, capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    status, _, err = run("generate", "--prompt", "x", "--out", "out", "--bundle", tmp_path)
    assert status == 2
    assert "is a checkpoint, or an export that did not finish, and no bundle" in err
    assert f"python -m export {tmp_path} --out bundles/{tmp_path.name}" in err
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is a checkpoint" in capsys.readouterr().err


def test_a_flipped_bit_of_a_file_that_will_run_is_refused(tmp_path, capsys):
    folder = write_bundle(tmp_path / "bundle")
    graph = folder / "transformer/model_int8.onnx"
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    draw = ["generate", "--bundle", str(folder), "--prompt", "x", "--out", str(tmp_path / "a.png")]
    assert main([*draw, "--precision", "int8", "--engine", "onnxruntime-cpu"]) == 2
    assert "transformer/model_int8.onnx is not what was exported" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    # What does not run is not read.
    assert main([*draw, "--precision", "fp32", "--engine", "onnxruntime-cpu"]) == 0


@pytest.mark.parametrize("residency", ["planned", "together", "in-turns"])
def test_parts_in_turns_draw_the_same(run, tmp_path, residency):
    def draw(name: str, *more: str) -> np.ndarray:
        status, _, err = run("generate", "--prompt", "lesion", "--seed", 3, "--out",
                             tmp_path / name, *more)  # fmt: skip
        assert (status, "take turns" in err) == (0, "in-turns" in more)
        return np.asarray(Image.open(tmp_path / name))

    assert np.array_equal(draw("a.png"), draw("b.png", "--residency", residency))


def test_tiers_by_name(run, tmp_path):
    arguments = ("generate", "--prompt", "benign lesion", "--seed", 1, "--steps", 12, "--out")
    _, (plain,), _ = run(*arguments, tmp_path / "plain.png")
    status, (line,), _ = run(*arguments, tmp_path / "a.png", "--tier", "cached")
    assert status == 0
    assert line == {**plain, "file": str(tmp_path / "a.png"), "tier": "cached"}
    assert read_marks((tmp_path / "a.png").read_bytes())["dermaflux.tier"] == "cached"
    _, (line,), _ = run(*arguments, tmp_path / "b.png", "--tier", "lossless")
    assert (line["precision"], "tier" in line) == ("fp32", False)

    status, _, _ = run("classify", tmp_path / "a.png", "--tier", "int8")
    assert status == 0
    status, _, err = run("classify", tmp_path / "a.png", "--tier", "pruned")
    assert status == 2
    assert "tier 'pruned' needs classifier in int8-pruned" in err


def test_pictures_are_classified_and_bad_ones_named(run, tmp_path):
    folder = tmp_path / "photographs"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (64, 48), "red").save(folder / "a.jpg")
    Image.new("RGB", (64, 48), "blue").save(folder / "sub/b.PNG")
    (folder / "notes.txt").write_text("no picture")
    status, lines, _ = run("classify", folder)
    assert status == 0
    assert [line["file"] for line in lines] == [str(folder / "a.jpg"), str(folder / "sub/b.PNG")]
    assert {"label", "probability", "threshold", "decision", "logits"} < lines[0].keys()

    (folder / "broken.png").write_bytes(b"no picture")
    status, lines, _ = run("classify", tmp_path / "absent.png", folder)
    assert status == 1
    assert lines[0] == {"file": str(tmp_path / "absent.png"), "error": "No such file or directory"}
    assert lines[2]["error"] == "the file is not a JPEG, PNG or WebP picture"
    assert len(lines) == 4

    (tmp_path / "empty").mkdir()
    status, lines, _ = run("classify", tmp_path / "empty", folder / "a.jpg")
    assert status == 1
    assert "has no picture" in lines[0]["error"]
    assert "label" in lines[1]
