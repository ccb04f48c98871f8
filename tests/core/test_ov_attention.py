"""An attention whose factors are in 8 bits has its weights in them too, and turns keys itself."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from dermaflux.engines.ov import core
from dermaflux.engines.ov_attention import keys_within, weights_in8

SHAPE = (-1, 9, 2, 4)
HINT = {"INFERENCE_PRECISION_HINT": "f32"}


def rounded(value, levels: int = 256):
    ends = [ops.constant(np.float32(x)) for x in (-128 / 32, 127 / 32)]
    return ops.fake_quantize(value, *ends, *ends, levels)


def across(value, order):
    return ops.transpose(value, ops.constant(np.array(order)))


def model(
    levels: int = 256, dtype=np.float32, users: int = 1, tokens: int = 9, by: float | None = None
) -> openvino.Model:
    shape = [*SHAPE[:1], tokens, *SHAPE[2:]]
    given = [ops.parameter(shape, np.float32) for _ in range(3)]
    query, key, value = (ops.convert(rounded(one, levels), dtype) for one in given)
    scores = ops.matmul(across(query, [0, 2, 1, 3]), across(key, [0, 2, 3, 1]), False, False)
    weights = ops.softmax(scores, -1)
    if by is not None:
        weights = ops.multiply(weights, ops.constant(np.float32(by)))
    mixed = ops.matmul(weights, across(value, [0, 2, 1, 3]), False, False)
    return openvino.Model([mixed, weights][:users], given)


def coarser(graph: openvino.Model) -> openvino.Model:
    """Weights in 127 steps."""
    (softmax,) = (n for n in graph.get_ordered_ops() if n.get_type_name() == "Softmax")
    (user,) = softmax.output(0).get_target_inputs()
    ends = [ops.constant(np.float32(end)) for end in (-128 / 127, 1)]
    user.replace_source_output(ops.fake_quantize(softmax, *ends, *ends, 256).output(0))
    graph.validate_nodes_and_infer_types()
    return graph


def answer(graph: openvino.Model) -> np.ndarray:
    shape = [2, *(axis.get_length() for axis in list(graph.input(0).get_partial_shape())[1:])]
    given = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
    return np.array(core().compile_model(graph, "CPU", HINT)(list(given))[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_are_rounded_to_255_steps_and_keys_turned_within(dtype):
    before, after = answer(model(dtype=dtype)), model(dtype=dtype)
    assert keys_within(after) == 1
    assert np.abs(answer(after) - before).max() < 2e-3 if dtype == np.float16 else 1e-5
    assert weights_in8(after) == 1
    # Each of nine weights is off by half a step at most, and values are below 4.
    assert 0 < np.abs(answer(after) - before).max() < 9 * 4 * 0.5 / 255
    orders = [list(node.input_value(1).get_node().get_data()) for node in after.get_ordered_ops()
              if node.get_type_name() == "Transpose"]  # fmt: skip
    assert orders == [[0, 2, 1, 3]] * 3


def test_weights_that_are_rounded_already_get_the_finer_steps():
    """As a file has them: in 127 steps, since TensorRT takes no unsigned numbers."""
    plain, coarse = model(), coarser(model())
    exact = answer(plain)
    before = np.abs(answer(coarse) - exact).max()
    assert weights_in8(plain) == weights_in8(coarse) == 1
    assert np.array_equal(answer(coarse), answer(plain))
    assert np.abs(answer(coarse) - exact).max() < before


def test_what_is_not_in_8_bits_stays_as_it_is():
    high = model(levels=65536)
    assert (weights_in8(high), keys_within(high)) == (0, 0)
    assert weights_in8(model(users=2)) == 0


def test_more_weights_than_steps_are_not_rounded():
    """Of a thousand even weights each is less than half a step: all would be nought."""
    plain, rounded_twice = model(tokens=1000), coarser(model(tokens=1000))
    exact = answer(plain)
    assert weights_in8(plain) == weights_in8(rounded_twice) == 0
    assert np.array_equal(answer(plain), exact)
    assert np.array_equal(answer(rounded_twice), exact)
    assert (weights_in8(model(tokens=255)), weights_in8(model(tokens=256))) == (1, 0)
    assert weights_in8(model(tokens=-1)) == 0


def test_what_scales_weights_is_not_left_out():
    assert weights_in8(model(by=3)) == 0
    assert weights_in8(coarser(model(by=3))) == 0
    assert weights_in8(model(by=1)) == 1
