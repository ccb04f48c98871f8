"""Pixels into a first layer in 8 bits keep all their values."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from dermaflux.engines.ov import core
from dermaflux.engines.ov_pixels import numbers, shifted

HIGH = np.float32(1)


def model(
    margin: int = 0, dtype=np.float32, between: bool = False, by: object = None
) -> openvino.Model:
    """A convolution in 8 bits as a file has it: Q and DQ of its input and of its weights."""
    given = ops.parameter([-1, 3, 8, 8], np.float32)
    value = ops.relu(given) if between else given
    value = value if dtype == np.float32 else ops.convert(ops.convert(value, dtype), np.float32)
    step = HIGH / 127
    ends = [ops.constant(np.float32(end)) for end in (-128 * step, HIGH, -128, 127)]
    rounded = ops.convert(ops.fake_quantize(value, *ends, 256), np.int8)
    pixels = ops.multiply(ops.convert(rounded, dtype), ops.constant(dtype(step)))
    if by is not None:
        pixels = ops.multiply(pixels, ops.constant(np.array(by, dtype)))
    random = np.random.default_rng(0)
    small = ops.constant(random.integers(-127, 128, (5, 3, 4, 4)).astype(np.int8))
    scale = ops.reshape(ops.constant(np.full(5, 0.01, dtype)), ops.constant([5, 1, 1, 1]), False)
    nought = ops.constant(np.zeros((5, 1, 1, 1), dtype))
    weights = ops.multiply(ops.subtract(ops.convert(small, dtype), nought), scale)
    pad = [margin, margin]
    made = ops.convolution(pixels, weights, [4, 4], pad, pad, [1, 1])
    return openvino.Model([ops.convert(made, np.float32)], [given])


def answer(graph: openvino.Model, pixels: np.ndarray) -> np.ndarray:
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return np.array(core().compile_model(graph, "CPU", hint)({0: pixels})[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pixels_are_not_rounded(dtype):
    drawn = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8))
    pixels = (drawn / 255 * 2 - 1).astype(np.float32)
    graph = model(dtype=dtype)
    (layer,) = (node for node in graph.get_ordered_ops() if node.get_type_name() == "Convolution")
    weights = numbers(layer.input_value(1))
    cut = pixels.reshape(2, 3, 2, 4, 2, 4)
    exact = np.einsum("bcyixj,ocij->boyx", cut, weights)
    before = np.abs(answer(graph, pixels) - exact).max()
    assert shifted(graph) == 1
    after = np.abs(answer(graph, pixels) - exact).max()
    assert before > 0.01
    assert after < (1e-4 if dtype == np.float32 else 0.2 * before)


def test_what_is_no_first_layer_without_a_margin_stays():
    assert shifted(model(margin=1)) == 0
    assert shifted(model(between=True)) == 0


def test_what_scales_pixels_on_their_way_is_not_left_out():
    assert shifted(model(by=3)) == 0
    assert shifted(model(by=np.array([1, 2, 3]).reshape(1, 3, 1, 1))) == 0
