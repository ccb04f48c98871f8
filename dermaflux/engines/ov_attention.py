"""Both products of an attention in 8 bits, as OpenVINO's CPU takes them in one pass.

A file has queries, keys, values and weights, what a softmax makes, in 8 bits (`export.attention`).
Weights have no sign, and 127 steps there, since TensorRT takes no unsigned numbers. Here they are
rounded to 255 from nought to one instead. Rows of even weights lose most by it, those of a peak
nearly nothing; and an even row of more tokens than there are steps would lose all, so those of that
many stay high.

Keys are turned within the product, which packs them anyhow: OpenVINO would turn them byte by byte.

    >>> model = core().read_model("model_int8.onnx")
    >>> weights_in8(model), keys_within(model)
    (12, 12)
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

_LEVELS: Final = 256
_ACROSS: Final = [0, 2, 3, 1]
"""How keys [B, N, heads, size] become the second factor of a product as it is."""
_HEADS: Final = [0, 2, 1, 3]
_SAME: Final = ("Convert", "Transpose", "Reshape")
"""Operators that change no number that 8 bits hold."""


def weights_in8(model: Any) -> int:
    """Round what a softmax makes to 255 steps, in place of what it is rounded to, wherever its only
    reader multiplies it with numbers that are rounded too; how often. Rows of more weights than
    steps, or of how many is not known, go to the product as the softmax made them.
    """
    from openvino import opset13

    count, changed = 0, False
    for softmax in model.get_ordered_ops():
        users = list(softmax.output(0).get_target_inputs()) if _is(softmax, "Softmax") else []
        between = []
        while len(users) == 1 and users[0].get_index() == 0 and rounds(users[0].get_node()):
            between.append(users[0].get_node())
            users = list(between[-1].output(0).get_target_inputs())
        if len(users) != 1 or not _is(users[0].get_node(), "MatMul") or users[0].get_index() != 0:
            continue
        if not same_numbers(between):
            continue
        if not _rounded(users[0].get_node().input_value(1)):
            continue
        value = softmax.output(0)
        if not _few(value):
            if between and value.get_element_type() == users[0].get_element_type():
                users[0].replace_source_output(value)
                changed = True
            continue
        kept = value.get_element_type().to_dtype()
        if kept != np.float32:
            value = opset13.convert(value, np.float32).output(0)
        ends = [opset13.constant(np.float32(end)) for end in (0, 1)]
        made = opset13.fake_quantize(value, *ends, *ends, _LEVELS)
        made.set_friendly_name(f"{softmax.get_friendly_name()}.in8")
        users[0].replace_source_output(
            (made if kept == np.float32 else opset13.convert(made, kept)).output(0)
        )
        count += 1
    if count or changed:
        model.validate_nodes_and_infer_types()
    return count


def keys_within(model: Any) -> int:
    """Let products turn keys that are in 8 bits themselves; how many."""
    from openvino import opset13

    count = 0
    for product in model.get_ordered_ops():
        if not _is(product, "MatMul") or any(
            product.get_attributes()[name] for name in ("transpose_a", "transpose_b")
        ):
            continue
        turned = product.input_value(1).get_node()
        while _is(turned, "Convert"):
            turned = turned.input_value(0).get_node()
        if not _is(turned, "Transpose") or len(turned.output(0).get_target_inputs()) != 1:
            continue
        order = turned.input_value(1).get_node()
        if not _is(order, "Constant") or list(order.get_data().reshape(-1)) != _ACROSS:
            continue
        if not _rounded(turned.input_value(0)):
            continue
        heads = opset13.transpose(turned.input_value(0), opset13.constant(np.array(_HEADS)))
        kept = product.input_value(0).get_element_type().to_dtype()
        if heads.get_output_element_type(0).to_dtype() != kept:
            heads = opset13.convert(heads, kept)
        users = product.output(0).get_target_inputs()
        made = opset13.matmul(product.input_value(0), heads, False, True)
        made.set_friendly_name(product.get_friendly_name())
        for user in users:
            user.replace_source_output(made.output(0))
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _is(node: Any, kind: str) -> bool:
    return bool(node.get_type_name() == kind)


def rounds(node: Any) -> bool:
    """Whether a node is of a pair of QuantizeLinear and DequantizeLinear as OpenVINO reads it, or
    only changes the type."""
    kind = node.get_type_name()
    if kind == "Convert":
        return True
    others = [node.input_value(index).get_node() for index in range(1, len(node.inputs()))]
    single = all(_single(other) is not None for other in others)
    return kind in ("FakeQuantize", "Subtract", "Multiply") and single


def same_numbers(between: list[Any]) -> bool:
    """Whether what stands between two values only rounds: it comes out as large as it went in."""
    factor = 1.0
    for node in between:
        kind = node.get_type_name()
        if kind == "Convert":
            continue
        own = [
            _single(node.input_value(index).get_node()) for index in range(1, len(node.inputs()))
        ]
        if kind == "Subtract" and own[0] != 0:
            return False
        if kind == "Multiply":
            factor *= own[0]
        if kind == "FakeQuantize":
            if node.get_attributes()["levels"] != _LEVELS or own[1] == 0:
                return False
            factor *= own[3] / own[1]
    # Steps in fp16 are off by a part in two thousand.
    return abs(factor - 1) < 2e-3


def _few(weights: Any) -> bool:
    """Whether a row is known to have no more weights than there are steps."""
    axis = weights.get_partial_shape()[-1]
    return bool(axis.is_static and axis.get_length() < _LEVELS)


def _single(node: Any) -> Any:
    """The number that a node is, if it is one constant number, of whatever type."""
    while _is(node, "Convert"):
        node = node.input_value(0).get_node()
    if not _is(node, "Constant") or node.get_data().size != 1:
        return None
    return float(node.get_data().reshape(-1)[0])


def _rounded(value: Any) -> bool:
    """Whether a value comes out of 8 bits."""
    node = value.get_node()
    while node.get_type_name() in _SAME:
        node = node.input_value(0).get_node()
    return _is(node, "FakeQuantize") and node.get_attributes()["levels"] == _LEVELS
