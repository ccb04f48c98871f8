"""OpenVINO's graphs as they are run: outputs that are not read, unsigned bytes, bf16 on trial."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dermaflux.engines import OPENVINO, Choice, ov, ov_library
from dermaflux.engines.ov_engine import OpenVinoEngine
from dermaflux.engines.ov_graph import hoist, read, unsigned
from dermaflux.engines.ov_settings import has_bf16
from dermaflux.flow import noise

STEP = 0.03125


def graph(folder: Path, *, other: bool = False) -> Path:
    """x [B, 8] through 8 bits, times constant weights, as `y`; with `other` the input in 8 bits is
    an output as well."""
    random = np.random.default_rng(0)
    constants = {
        "step": np.array(STEP, np.float32),
        "zero": np.array(0, np.int8),
        "weights": random.integers(-127, 128, (8, 4), dtype=np.int8),
        "scale": np.full(4, 0.01, np.float32),
        "zeros": np.zeros(4, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["weights", "scale", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
        helper.make_node("Relu", ["d" if other else "x"], ["more"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", 8), ("y", 4), ("more", 8))
    ]
    made = helper.make_graph(
        nodes,
        "layer",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    file = folder / "model_int8.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), file)
    return file


def expected(file: Path, x: np.ndarray) -> np.ndarray:
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(file).graph.initializer}
    return np.rint(x / STEP).clip(-127, 127) * STEP @ (held["weights"] * np.float32(0.01))


def test_unsigned_bytes_are_the_same_numbers(tmp_path):
    file = graph(tmp_path)
    model = ov.core().read_model(str(file))
    assert unsigned(model) == 1
    assert unsigned(model) == 0
    x = noise(3, (5, 8)).astype(np.float32)
    found = ov.core().compile_model(model, "CPU")({"x": x})["y"]
    assert np.abs(found - expected(file, x)).max() < 1e-4
    engine = OpenVinoEngine(file, "int8").run({"x": x})
    assert np.abs(engine["y"] - found).max() < 1e-4


def test_bytes_that_others_read_stay_as_they_are(tmp_path):
    model = ov.core().read_model(str(graph(tmp_path, other=True)))
    assert unsigned(model) == 0


def test_outputs_that_are_not_asked_for_are_not_computed(tmp_path):
    file = graph(tmp_path)
    x = noise(3, (5, 8)).astype(np.float32)
    whole = OpenVinoEngine(file, "int8").run({"x": x})
    lean = OpenVinoEngine(file, "int8", outputs=("y", "nobody")).run({"x": x})
    assert list(whole) == ["y", "more"]
    assert list(lean) == ["y"]
    assert np.array_equal(lean["y"], whole["y"])
    kinds = {op.get_type_name() for op in read(ov.core(), file, ("y",)).get_ops()}
    assert "MatMul" in kinds
    assert "Relu" not in kinds


class Able:
    """OpenVINO's core on a processor with bf16; what it compiles for bf16 is off by a share."""

    def __init__(self, off: float) -> None:
        self.core = ov.core()
        self.off = off
        self.hints: list[str] = []

    def get_property(self, device: str, name: str) -> list[str]:
        return ["FP32", "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else []

    def read_model(self, path: str) -> Any:
        return self.core.read_model(path)

    def compile_model(self, model: Any, device: str, settings: dict[str, str]) -> Any:
        hint = settings["INFERENCE_PRECISION_HINT"]
        self.hints.append(hint)
        compiled = self.core.compile_model(model, device, settings)
        return Off(compiled, self.off) if hint == "bf16" else compiled


class Off:
    """A compiled model whose answers are off by a share of their largest."""

    def __init__(self, compiled: Any, share: float) -> None:
        self.compiled, self.share = compiled, share
        self.inputs, self.outputs = compiled.inputs, compiled.outputs

    def __call__(self, inputs: Any) -> dict[int, np.ndarray]:
        answers = self.compiled(inputs).values()
        return {i: a + self.share * np.abs(a).max() for i, a in enumerate(answers)}


@pytest.mark.parametrize(
    ("part", "precision", "off", "computes"),
    [
        ("classifier", "int8", 0.01, "bf16"),
        ("classifier", "bf16", 0.01, "bf16"),
        ("classifier", "int8", 0.3, "f32"),
        ("classifier", "int8", float("nan"), "f32"),
        ("classifier", "fp32", 0.01, "f32"),
        ("transformer", "int8", 0.01, "f32"),
    ],
)
def test_a_classifier_is_in_bf16_where_that_is_near(
    tiny_bundle, monkeypatch, caplog, part, precision, off, computes
):
    core = Able(off)
    monkeypatch.setattr(ov_library, "_cores", [core])
    file = replace(tiny_bundle.parts[part].files["fp32"], parity=None)
    parts = {part: replace(tiny_bundle.parts[part], files={precision: file})}
    with caplog.at_level(logging.INFO, "dermaflux.engines.ov_engine"):
        made = ov.load(replace(tiny_bundle, parts=parts), Choice(part, OPENVINO, precision, ""))
    assert made.computes == computes
    tried = part == "classifier" and precision != "fp32"
    assert core.hints == (["f32", "bf16"] if tried else ["f32"])
    assert bool(made.note) == tried == bool(caplog.messages)
    assert made.note.startswith("fp32") == (tried and computes == "f32")


def test_this_processor_is_asked(tiny_bundle):
    made = ov.load(tiny_bundle, Choice("classifier", OPENVINO, "int8", ""))
    assert (made.note != "") == has_bf16()


def test_what_is_turned_is_rounded_first(tmp_path):
    """As TensorRT wants it, the rounding is after the turn; moved before it, all is the same."""
    node, tensor = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Relu", ["x"], ["h"]),
        node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
        node("Reshape", ["t", "flat"], ["r"]),
        node("QuantizeLinear", ["r", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        node("Sub", ["d", "step"], ["y"]),
    ]
    constants = {
        "flat": np.array([0, 12]),
        "step": np.array(STEP, np.float32),
        "zero": np.array(0, np.int8),
    }
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    ends = [
        tensor("x", TensorProto.FLOAT, ["batch", 3, 4]),
        tensor("y", TensorProto.FLOAT, ["batch", 12]),
    ]
    file = tmp_path / "model.onnx"
    made = helper.make_graph(nodes, "turned", ends[:1], ends[1:], held)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), file)
    core = ov.core()
    model = core.read_model(str(file))
    x = noise(3, (5, 3, 4)).astype(np.float32)
    before = core.compile_model(model, "CPU")({"x": x})["y"]
    assert hoist(model) == 1
    assert hoist(model) == 0
    assert np.array_equal(core.compile_model(model, "CPU")({"x": x})["y"], before)
    order = [op.get_type_name() for op in model.get_ordered_ops()]
    assert order.index("FakeQuantize") < order.index("Transpose")
