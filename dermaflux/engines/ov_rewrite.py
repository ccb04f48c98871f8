"""A transformer's graph in the words that OpenVINO's CPU plugin computes fastest; equal numbers.

Its own way with an attention scales and turns the keys in two passes over memory before the kernel
that does all the rest; `attentions` spells it out, so that the kernel does these too. A layer of
8-bit numbers behind a concatenation has it joined in float32 first and rounded in another pass;
`joined` rounds before it, where whoever made the values can do it on the way.

    >>> model = read(core(), Path("model_int8.onnx"))
    >>> attentions(model), joined(model)
    (6, 4)
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from dermaflux.engines.ov_library import openvino
from dermaflux.engines.ov_nodes import changed

opset13 = openvino.opset13

_BOUNDS: Final = range(1, 5)
"""FakeQuantize's inputs that tell from where to where numbers go."""


def attentions(model: Any) -> int:
    """Spell out every ScaledDotProductAttention without a mask and with the usual factor, one over
    the root of a head's size; how many there were."""
    return changed(model, "ScaledDotProductAttention", _spelled)


def joined(model: Any) -> int:
    """Multiply by constants and round to 8 bits before a concatenation of channels instead of after
    it; how many concatenations there were."""
    return changed(model, "Concat", _rounded_before)


def _spelled(node: Any) -> bool:
    query, key, value, *others = (node.input_value(index) for index in range(len(node.inputs())))
    size = query.get_partial_shape()[-1]
    if node.get_attributes()["causal"] or size.is_dynamic:
        return False
    # A mask may be one nought for all, which changes nothing; a factor of its own comes after it.
    if len(others) > 1 or not all(_nought(other) for other in others):
        return False
    factor = opset13.constant(1 / math.sqrt(size.get_length()), query.get_element_type())
    scores = opset13.multiply(opset13.matmul(query, key, False, True), factor)
    mixed = opset13.matmul(opset13.softmax(scores, -1), value, False, False)
    mixed.set_friendly_name(node.get_friendly_name())
    _replace(node, mixed)
    return True


def _nought(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() in ("Convert", "ConvertLike"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and not np.any(node.get_data())


def _rounded_before(concat: Any) -> bool:
    chain: list[Any] = []
    node = concat
    while (user := _only_user(node)) is not None and _by_channel(user):
        chain.append(user)
        node = user
    while chain and chain[-1].get_type_name() != "FakeQuantize":
        chain.pop()
    shapes = [
        concat.input_value(index).get_partial_shape() for index in range(len(concat.inputs()))
    ]
    last = shapes[0].rank.get_length() - 1
    if not chain or concat.get_attributes()["axis"] not in (-1, last):
        return False
    if any(shape[last].is_dynamic for shape in shapes):
        return False
    ends = np.cumsum([shape[last].get_length() for shape in shapes])
    parts = []
    for index, end in enumerate(ends):
        made = concat.input_value(index)
        channels = slice(int(end) - shapes[index][last].get_length(), int(end))
        for step in chain:
            made = _again(step, made, channels)
        parts.append(made)
    whole = opset13.concat(parts, -1)
    whole.set_friendly_name(chain[-1].get_friendly_name())
    _replace(chain[-1], whole)
    return True


def _only_user(node: Any) -> Any | None:
    users = list(node.output(0).get_target_inputs())
    return users[0].get_node() if len(users) == 1 and users[0].get_index() == 0 else None


def _by_channel(node: Any) -> bool:
    """Whether a node does to each channel what constants say."""
    kind = node.get_type_name()
    if kind == "FakeQuantize":
        bounds = [_constant(node, index) for index in _BOUNDS]
        return all(bound is not None and bound.size == 1 for bound in bounds)
    return kind == "Convert" or (kind == "Multiply" and _constant(node, 1) is not None)


def _constant(node: Any, index: int) -> Any | None:
    """An input's numbers, where they are constant and of a type that numpy has."""
    source = node.input_value(index).get_node()
    known = source.get_output_element_type(0) in (openvino.Type.f32, openvino.Type.f16)
    return source.get_data() if source.get_type_name() == "Constant" and known else None


def _again(node: Any, value: Any, channels: slice) -> Any:
    """The same node over some of the channels."""
    kind = node.get_type_name()
    if kind == "Convert":
        return opset13.convert(value, node.get_output_element_type(0)).output(0)
    if kind == "Multiply":
        factor = _constant(node, 1)
        assert factor is not None
        if factor.size > 1:
            factor = np.ascontiguousarray(factor[..., channels])
        made = opset13.constant(factor, node.get_output_element_type(0))
        return opset13.multiply(value, made).output(0)
    bounds = [opset13.constant(_constant(node, index)) for index in _BOUNDS]
    return opset13.fake_quantize(value, *bounds, node.get_attributes()["levels"]).output(0)


def _replace(node: Any, by: Any) -> None:
    for user in node.output(0).get_target_inputs():
        user.replace_source_output(by.output(0))
