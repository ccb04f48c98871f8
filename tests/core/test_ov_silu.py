"""8 bits of what SiLU gives: the same places, in finer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dermaflux.engines import ov
from dermaflux.engines.ov_silu import LEAST, bounds, onesided
from dermaflux.flow import noise

STEP = 0.0625


def graph(
    folder: Path, *, gate: str = "Sigmoid", product: str = "Conv", shared: bool = False
) -> Path:
    """x [B, 8, H, W]: x * gate(x) through 8 bits, convolved with weights in 8 bits, as `y`, and the
    same in float32 as `z`. With `shared` what is in 8 bits is an output too."""
    random = np.random.default_rng(0)
    shape = (3, 8, 3, 3) if product == "Conv" else (8, 8)
    constants = {
        "step": np.array(STEP, np.float32),
        "zero": np.array(0, np.int8),
        "weights": random.integers(-127, 128, shape, dtype=np.int8),
        "scale": np.full(shape[0], 0.01, np.float32),
        "zeros": np.zeros(shape[0], np.int8),
    }
    nodes = [
        helper.make_node(gate, ["x"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["silu"]),
        helper.make_node("QuantizeLinear", ["silu", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["weights", "scale", "zeros"], ["w"], axis=0),
        helper.make_node(product, ["d", "w"], ["y"]),
        helper.make_node(product, ["silu", "w"], ["z"]),
        helper.make_node("Relu", ["d"], ["more"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None, None])
        for name in ("y", "z", "more")
    ]
    made = helper.make_graph(
        nodes if shared else nodes[:-1],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, "height", 8])],
        ends if shared else ends[:-1],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    file = folder / "model_int8.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]), file)
    return file


def off(model: Any, x: np.ndarray) -> float:
    """Error of 8 bits, of the largest output."""
    found = ov.core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"x": x})
    return float(np.abs(found["y"] - found["z"]).mean() / np.abs(found["z"]).max())


def test_steps_are_finer_and_the_numbers_nearer(tmp_path):
    model = ov.core().read_model(str(graph(tmp_path)))
    x = (4 * noise(1, (2, 8, 16, 8))).clip(-20, 127 * STEP)
    before = off(model, x)
    assert onesided(model) == 1
    assert onesided(model) == 0
    assert 0 < off(model, x) < 0.6 * before


@pytest.mark.parametrize("different", [{"gate": "Tanh"}, {"product": "MatMul"}, {"shared": True}])
def test_others_stay_as_they_are(tmp_path, different):
    assert onesided(ov.core().read_model(str(graph(tmp_path, **different)))) == 0


@pytest.mark.parametrize("largest", [1e-3, 0.2, 1.0, 7.9375, 16.3, 1e4])
def test_nothing_that_silu_gives_is_cut_and_nought_is_a_step(largest):
    low, high = bounds(largest)
    step = (high - low) / 255
    assert low <= LEAST
    assert high >= largest
    assert low / step == pytest.approx(round(low / step))
    assert step <= (largest - LEAST) / 254 * (1 + 1e-9)


def test_the_least_is_what_silu_gives_at_its_lowest():
    x = np.linspace(-3, 0, 300_001)
    assert (x / (1 + np.exp(-x))).min() == pytest.approx(LEAST, abs=1e-8)
