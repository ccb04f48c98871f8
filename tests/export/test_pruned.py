"""A bundle with a pruned classifier: made beside the others, never chosen unless asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.engines.merging import SHARE
from dermaflux.errors import EngineError
from export.__main__ import Settings, main
from export.pruned import merger_of
from export.recipes import PRUNED

LEVELS = ["--precision", f"fp32,{PRUNED}", "--prompts", "1"]


def deeper(tiny: Path, folder: Path, architecture: str) -> Path:
    """The tiny checkpoint with another classifier."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for one in tiny.iterdir():
        if one.name != "classifier":
            (folder / one.name).symlink_to(one)
    (folder / "classifier").mkdir()
    config = json.loads((tiny / "classifier/config.json").read_text())
    config |= {"architecture": architecture}
    if architecture.startswith("vit"):
        config["model_args"] = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4,
                                "num_heads": 2}  # fmt: skip
    else:
        config["model_args"] = {}
    torch.manual_seed(1)
    model = timm.create_model(architecture, num_classes=2, **config["model_args"])
    config["num_features"] = model.num_features
    (folder / "classifier/config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "classifier/model.safetensors")
    return folder


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory) -> Bundle:
    base = tmp_path_factory.mktemp("pruned")
    checkpoint = deeper(tiny_checkpoint, base / "deeper", "vit_tiny_patch16_224")
    assert main([str(checkpoint), "--out", str(base / "bundle"), *LEVELS, "--merged", "0.5"]) == 0
    return Bundle.open(base / "bundle", verify=True)


def test_a_pruned_file_is_the_classifiers_alone(pruned):
    files = {name: set(part.files) for name, part in pruned.parts.items()}
    assert files["classifier"] == {"fp32", PRUNED}
    assert all(PRUNED not in found for name, found in files.items() if name != "classifier")
    file = pruned.parts["classifier"].files[PRUNED]
    assert file.path == "classifier/model_int8-pruned.onnx"
    assert file.parity is not None
    assert file.parity.relative < 0.25
    # Three of the attention, its projection and two of the MLP in each of four blocks.
    assert file.quantized_ops["openvino-cpu"]["FullyConnected"] == {"f32": 1, "i8": 24}
    assert set(pruned.parity.images) == {"fp32"}
    assert set(pruned.parity.classifier) == {"fp32", PRUNED}
    assert pruned.provenance["export"]["merged"] == 0.5


def test_it_runs_where_it_is_asked_for_and_says_so(pruned):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (40, 44, 3), np.uint8)) for _ in range(5)]
    plain = Classifier.open(pruned)
    asked = Classifier.open(pruned, tier="pruned")
    assert (plain.engine.precision, asked.engine.precision) == ("fp32", PRUNED)
    found = asked.classify(pictures)
    assert [one.tier for one in found] == ["pruned"] * 5
    assert {one.tier for one in plain.classify(pictures)} == {None}
    assert found == [asked.classify([one])[0] for one in pictures]
    assert found == Classifier.open(pruned, precision=PRUNED).classify(pictures)
    moved = [
        abs(a.probability - b.probability)
        for a, b in zip(found, plain.classify(pictures), strict=True)
    ]
    assert 0 < max(moved) < 0.2
    # A merged patch has no place on a map.
    assert asked.judge([asked.prepare(pictures[0], saliency=True)])[0].saliency is None
    assert plain.judge([plain.prepare(pictures[0], saliency=True)])[0].saliency is not None


def test_what_is_no_vision_transformer_has_no_such_file(tiny_checkpoint, tmp_path, caplog):
    checkpoint = deeper(tiny_checkpoint, tmp_path / "net", "test_efficientnet")
    with caplog.at_level(logging.INFO, "export"):
        assert merger_of(checkpoint, 0.6) is None
    assert "classifier has no pruned file: EfficientNet" in caplog.text
    assert merger_of(deeper(tiny_checkpoint, tmp_path / "vit", "vit_tiny_patch16_224"), 0.6)


def test_a_bundle_without_it_says_what_is_missing(tiny_bundle):
    with pytest.raises(EngineError, match="'pruned' needs classifier in int8-pruned"):
        Classifier.open(tiny_bundle, tier="pruned")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--precision", PRUNED], "add fp32"),
        (["--precision", f"fp32,{PRUNED}", "--merged", "0"], "--merged 0.0 is no share"),
        (["--precision", f"fp32,{PRUNED}", "--engines", "onnxruntime-cpu"], "may run int8-pruned"),
    ],
)
def test_contradictions_are_refused(tiny_checkpoint, tmp_path, capsys, more, told):
    assert main([str(tiny_checkpoint), "--out", str(tmp_path / "out"), *more]) == 2
    assert told in capsys.readouterr().err


def test_the_commands_default_is_the_measured_one():
    assert Settings(Path()).merged == SHARE
