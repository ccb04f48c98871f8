"""Opening bundles strictly: a damaged one is refused with a sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dermaflux import files
from dermaflux.bundle import Bundle, write_manifest
from dermaflux.errors import BundleError

GRAPH = "transformer/model.onnx"


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_written_is_read(tiny_bundle):
    assert tiny_bundle.name == "tiny"
    assert tiny_bundle.defaults.guidance == 3.5
    assert tiny_bundle.classifier.abstain == (0.3, 0.5)
    assert tiny_bundle.parts["transformer"].inputs[0].shape == ("batch", "image_tokens", 16)
    assert tiny_bundle.parts["transformer"].files["int8"].engines[0] == "onnxruntime-cpu"
    assert tiny_bundle.parity.images["fp32"]["onnxruntime-cpu"].psnr_worst_db == 40.0


def test_the_id_names_the_content(folder):
    before = Bundle.open(folder).id
    assert len(before) == 16
    assert Bundle.open(str(folder), verify=True).id == before
    edit(folder, lambda m: m["defaults"].update(steps=5))
    assert Bundle.open(folder).id != before


DAMAGES = {
    "an unknown key": (lambda m: m.update(extra=1), "unknown key 'extra'"),
    "an unknown key within": (
        lambda m: m["limits"].update(max_sise=1),
        "limits has an unknown key",
    ),
    "a missing key": (lambda m: m.pop("wording"), "no key 'wording'"),
    "a missing key within": (lambda m: m["model"].pop("scale"), "model has no key 'scale'"),
    "another schema": (lambda m: m.update(schema=1), "schema 1, this version reads 2"),
    "no schema": (lambda m: m.pop("schema"), "schema None"),
    "a text for a number": (
        lambda m: m["defaults"].update(steps="4"),
        "defaults.steps needs an int",
    ),
    "a share for an integer": (lambda m: m["defaults"].update(steps=4.5), "needs an integer"),
    "a bool for an integer": (lambda m: m["defaults"].update(steps=True), "needs an integer"),
    "not a number": (lambda m: m["model"].update(scaling_factor=float("nan")), "finite number"),
    "not a number in free form": (
        lambda m: m["provenance"].update(loss=float("inf")),
        "a number that is not finite",
    ),
    "a list too short": (lambda m: m["classifier"].update(abstain=[0.3]), "needs 2 values, not 1"),
    "an unknown part": (
        lambda m: m["parts"].update(x=m["parts"]["transformer"]),
        "unknown part 'x'",
    ),
    "a missing part": (lambda m: m["parts"].pop("vae_decoder"), "no part 'vae_decoder'"),
    "no classifier graph": (lambda m: m["parts"].pop("classifier"), "no part 'classifier'"),
    "a part without files": (
        lambda m: m["parts"]["transformer"].update(files={}),
        "files is empty",
    ),
    "half precision at the edge": (
        lambda m: m["parts"]["transformer"]["inputs"][0].update(dtype="float16"),
        "hidden_states is float16",
    ),
    "a path that leaves": (
        lambda m: m["parts"]["transformer"]["files"]["fp32"].update(path="../model.onnx"),
        "'../model.onnx' leaves the bundle's folder",
    ),
    "an absolute path": (
        lambda m: m["parts"]["transformer"]["files"]["fp32"].update(path="/etc/passwd"),
        "leaves the bundle's folder",
    ),
    "a path that leaves midway": (
        lambda m: m["golden"].update(image="transformer/../../x.png"),
        "leaves the bundle's folder",
    ),
    "external data that is absent": (
        lambda m: m["parts"]["transformer"]["files"]["fp32"].update(
            data=[{"path": "transformer/model.onnx_data", "bytes": 1, "sha256": ""}]
        ),
        "transformer/model.onnx_data is missing",
    ),
    "a schedule that we cannot run": (
        lambda m: m["scheduler"].update(use_karras_sigmas=True),
        "use_karras_sigmas",
    ),
    "defaults out of limits": (lambda m: m["defaults"].update(height=4096), "defaults.height 4096"),
    "too many default steps": (lambda m: m["defaults"].update(steps=21), "not in 1 to 20"),
    "sizes that tokens do not fill": (
        lambda m: m["limits"].update(size_multiple=8),
        "size_multiple 8",
    ),
    "guidance without an input": (
        lambda m: m["model"].update(guidance_embeds=False),
        "contradicts guidance_embeds",
    ),
    "a band upside down": (lambda m: m["classifier"].update(abstain=[0.5, 0.3]), "abstain"),
    "a threshold in percent": (lambda m: m["classifier"].update(threshold=40), "threshold"),
    "no temperature": (lambda m: m["classifier"].update(temperature=0), "temperature"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(folder, damage):
    change, sentence = DAMAGES[damage]
    edit(folder, change)
    with pytest.raises(BundleError) as refusal:
        Bundle.open(folder)
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith(f"python -m export CHECKPOINT --out {folder}")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": 2}']
)
def test_a_manifest_that_is_no_manifest_is_refused(folder, text):
    (folder / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match="python -m export"):
        Bundle.open(folder)


def test_missing_and_damaged_files_are_refused(folder):
    graph = folder / GRAPH
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match=rf"{GRAPH} has {len(whole) - 1} bytes"):
        Bundle.open(folder)
    graph.unlink()
    with pytest.raises(BundleError, match=f"{GRAPH} is missing"):
        Bundle.open(folder)
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Bundle.open(folder)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(folder, verify=True)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "golden.png"])
def test_what_belongs_to_it_must_be_there(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Bundle.open(folder)
    with pytest.raises(BundleError, match=f"{name} is not what was exported"):
        Bundle.open(folder, verify=True)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(folder)


def test_graphs_of_another_bundle_are_refused(folder):
    one, other = folder / GRAPH, folder / "classifier/model.onnx"
    one.write_bytes(other.read_bytes())
    with pytest.raises(BundleError, match=f"{GRAPH} has {other.stat().st_size} bytes"):
        Bundle.open(folder)


def test_a_tokenizer_that_nobody_vouches_for_is_refused(folder):
    edit(folder, lambda m: m["files"].pop())
    with pytest.raises(BundleError, match="files has no tokenizer_2/tokenizer.json"):
        Bundle.open(folder)


def test_an_export_that_did_not_finish_is_refused(folder, tmp_path):
    (folder / "bundle.json").unlink()
    with pytest.raises(BundleError, match="the export did not finish"):
        Bundle.open(folder)
    with pytest.raises(BundleError, match="there is no bundle at"):
        Bundle.open(tmp_path / "nowhere")


def test_writing_is_whole_or_not_at_all(folder, monkeypatch):
    path = folder / "bundle.json"
    manifest = json.loads(path.read_text())
    path.unlink()
    names = {file.name for file in folder.iterdir()}

    def no_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", no_disk)
        with pytest.raises(OSError, match="No space"):
            write_manifest(folder, manifest)
    assert {file.name for file in folder.iterdir()} == names

    with pytest.raises(BundleError, match="no key 'wording'"):
        write_manifest(folder, {k: v for k, v in manifest.items() if k != "wording"})
    with pytest.raises(BundleError, match="finite"):
        write_manifest(
            folder, {**manifest, "model": {**manifest["model"], "scaling_factor": float("inf")}}
        )
    assert not path.exists()

    bundle = write_manifest(folder, manifest)
    assert bundle == Bundle.open(folder)
    assert json.loads(path.read_text()) == manifest
