"""Classifiers of convolutions and batch normalisation: their learnt statistics are in the graph,
their convolutions in 8 bits under their own names, and they have features and no saliency."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dermaflux.__main__ import main as dermaflux
from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import preprocess
from dermaflux.engines import OPENVINO, ORT, parts
from dermaflux.errors import BundleError
from export import __main__ as command
from export import trace
from export.lower import lower
from export.parity import Case, ParityError
from export.quantized import eligible, layers, missing
from export.recipes import RECIPES
from export.reference import Reference
from export.shapes import examples, sizes
from export.weights import of_module, skeleton

RESNEXT = ("resnext50_32x4d", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32],
                               "cardinality": 4, "base_width": 16})  # fmt: skip
RESNETV2 = ("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_chs": 8})
EFFICIENTNET: tuple[str, dict[str, Any]] = ("test_efficientnet", {})


def _learnt(architecture: str, args: dict[str, Any]) -> nn.Module:
    """A net whose statistics are far from those that it is born with."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=2, **args)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
    return model.eval()


def _write(folder: Path, architecture: str, args: dict[str, Any]) -> nn.Module:
    """The net as a checkpoint's classifier, in place of the one there."""
    model = _learnt(architecture, args)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 64, 64]
    config |= {"architecture": architecture, "model_args": args}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("resnext") / "tiny")
    _write(folder / "classifier", *RESNEXT)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """All that it needs in fp32 and int8, made by the export's own command line."""
    out = tmp_path_factory.mktemp("bundle") / "resnext"
    names = ",".join((*GENERATOR_PARTS, "classifier"))
    arguments = [str(checkpoint), "--out", str(out), "--prompts", "2", "--parts", names]
    assert command.main([*arguments, "--precision", "fp32,int8"]) == 0
    return Bundle.open(out)


def test_an_engine_says_what_torch_says(bundle: Bundle, tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8))
    picture.save(tmp_path / "a.png")
    assert bundle.classifier is not None
    pixels = torch.from_numpy(preprocess(picture, bundle.classifier))[None]
    with torch.no_grad():
        expected = _learnt(*RESNEXT)(pixels)[0].numpy()
    for engine, precision, share in ((OPENVINO, "fp32", 1e-4), (ORT, "fp32", 1e-4),
                                     (OPENVINO, "int8", 0.05)):  # fmt: skip
        asked = ["--engine", engine, "--precision", precision, str(tmp_path / "a.png")]
        with redirect_stdout(io.StringIO()) as printed:
            assert dermaflux(["classify", "--bundle", str(bundle.path), *asked]) == 0
        logits = json.loads(printed.getvalue().splitlines()[-1])["logits"]
        np.testing.assert_allclose(logits, expected, atol=share * float(np.abs(expected).max()))


def test_convolutions_run_in_int8_and_both_ends_do_not(bundle: Bundle) -> None:
    part = bundle.parts["classifier"]
    assert [output.name for output in part.outputs] == ["logits", "features"]
    assert part.files["fp32"].parity.relative < 1e-5
    # Four blocks of three convolutions, one of them grouped, and three ways around a block.
    found = part.files["int8"].quantized_ops[OPENVINO]
    assert found == {"Convolution": {"i8": 15, "f32": 1}, "FullyConnected": {"f32": 1}}


def test_what_is_fused_has_the_convolutions_name(bundle: Bundle) -> None:
    graph = onnx_ir.load(bundle.file(bundle.parts["classifier"].files["fp32"].path))
    model = _learnt(*RESNEXT)
    products = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    found = {layer.name: layer for layer in layers(graph)}
    assert set(found) == products
    assert found["layer1.0.conv2"].groups == 4
    assert "BatchNormalization" not in {node.op_type for node in graph.graph}
    recipe = RECIPES["int8"]["classifier"]
    whole = {n: np.ones(x.width * x.groups, np.float32) for n, x in found.items()}
    assert not missing(graph, recipe, whole)
    assert missing(graph, recipe, {**whole, "layer1.0.conv2": np.ones(3, np.float32)}) == [
        "layer1.0.conv2"
    ]
    # Convolutions stay high in fp8, so there is nothing that a file would be for.
    assert not eligible(graph, RECIPES["fp8"]["classifier"])


@pytest.fixture
def asked(checkpoint: Path, tmp_path: Path) -> tuple[Path, command.Settings, Checkpoint, Reference]:
    """What `_graphs` takes, for the classifier alone."""
    opened = Checkpoint.open(checkpoint)
    module = parts.module(checkpoint, "classifier")
    cases = []
    for size in sizes(opened):
        inputs = examples(opened, "classifier", size)
        outputs = module(torch.from_numpy(inputs["pixel_values"]))
        cases.append(Case(inputs, dict(zip(module.outputs, map(np.asarray, outputs), strict=True))))
    (tmp_path / "classifier").mkdir()
    settings = command.Settings(checkpoint=checkpoint, precision=("fp32", "fp8"))
    return tmp_path, settings, opened, Reference({"classifier": cases}, {"classifier": ()}, (), ())


def test_a_graph_that_is_off_is_refused_at_once(
    asked: tuple[Path, command.Settings, Checkpoint, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made of it, int8 above all: what fails then would be told instead."""
    folder, settings, opened, reference = asked

    def without_statistics(module: nn.Module, shards: Path) -> dict[str, Any]:
        learnt = {name for name, _ in module.named_parameters()}
        return {name: one for name, one in of_module(module, shards).items() if name in learnt}

    monkeypatch.setattr(trace, "of_module", without_statistics)
    settings = replace(settings, precision=("fp32", "int8"))
    made = command._graphs(folder, settings, opened, "classifier", None, reference, lambda _: None)
    with pytest.raises(ParityError, match=r"FAIL classifier +fp32"):
        list(made)


def test_a_precision_for_nothing_has_no_file(
    asked: tuple[Path, command.Settings, Checkpoint, Reference],
) -> None:
    folder, settings, opened, reference = asked
    made = command._graphs(folder, settings, opened, "classifier", None, reference, lambda _: None)
    assert [graph.precision for graph in made] == ["fp32"]


def test_shards_without_statistics_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint / "classifier", tmp_path / "classifier")
    state = _learnt(*RESNEXT).state_dict()
    kept = {k: v.contiguous() for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(kept, folder / "model.safetensors")
    module = skeleton(tmp_path, "classifier")
    assert "model.bn1.running_var" in of_module(module, folder)
    del kept["layer1.0.bn2.running_var"]
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(BundleError, match=r"lack layer1\.0\.bn2\.running_var, which needs \[16\]"):
        of_module(module, folder)


@pytest.mark.parametrize("net", [RESNETV2, EFFICIENTNET])
def test_other_families_have_logits_and_features(
    checkpoint: Path, tmp_path: Path, net: tuple[str, dict[str, Any]]
) -> None:
    """One whose head is a convolution, and one whose blocks are no transformer's."""
    shutil.copytree(checkpoint / "classifier", tmp_path / "classifier")
    model = _write(tmp_path / "classifier", *net)
    module = parts.module(tmp_path, "classifier")
    assert module.outputs == ("logits", "features")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = module(pixels)
        torch.testing.assert_close(logits, model(pixels))
    assert features.shape == (2, model.num_features)


def test_a_norm_that_is_not_fused_stays_in_float32(tmp_path: Path) -> None:
    """Behind a ReLU there is no convolution to take it up, and a variance may be beyond fp16."""
    numbers = {"scale": 1.0, "bias": 0.0, "mean": 2e5, "var": 4e10}
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["h"], name="relu"),
         helper.make_node("BatchNormalization", ["h", *numbers], ["y"], name="norm")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 2, 2])],
        [numpy_helper.from_array(np.full(2, n, np.float32), k) for k, n in numbers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    lowered = lower(onnx_ir.from_proto(onnx.shape_inference.infer_shapes(model)),
                    RECIPES["fp16"]["classifier"])  # fmt: skip
    onnx_ir.save(lowered, tmp_path / "low.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "low.onnx")
    (found,) = session.run(None, {"x": np.ones((1, 2, 2, 2), np.float32)})
    np.testing.assert_allclose(found, -1, rtol=1e-3)
