"""Pixels into a first layer in 8 bits, none of them changed.

A pixel has 256 values. Prepared with a mean and a deviation of a half, as vision transformers
usually are, they lie evenly from -1 to 1. A file's 8 bits have a nought and a sign, 127 steps each
way, and round nearly all of them a little: all that a first layer in 8 bits loses, for its weights
lose next to nothing. So the input is shifted here to begin at nought, in 255 steps to its end, and
the layer takes off at its end what the shift put on: h times the sum of its weights, for pixels
from -h to h. That needs a layer without a margin of noughts around the picture.

    >>> model = core().read_model("model_int8.onnx")
    >>> shifted(model)
    1
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.engines.ov_attention import rounds, same_numbers
from dermaflux.engines.ov_nodes import changed

_LEVELS: Final = 256
_CHAIN: Final = ("Convert", "Subtract", "Multiply")


def shifted(model: Any) -> int:
    """Shift what convolutions take of a graph's inputs; how many do."""
    return changed(model, "FakeQuantize", _shift)


def _shift(quantize: Any) -> bool:
    from openvino import opset13

    if quantize.get_attributes()["levels"] != _LEVELS or not _given(quantize.input_value(0)):
        return False
    between = [quantize]
    users = quantize.output(0).get_target_inputs()
    while len(users) == 1 and next(iter(users)).get_node().get_type_name() in _CHAIN:
        between.append(next(iter(users)).get_node())
        users = between[-1].output(0).get_target_inputs()
    # What else is done to pixels on the way would be lost.
    if len(users) != 1 or not all(map(rounds, between)) or not same_numbers(between):
        return False
    layer = next(iter(users)).get_node()
    if layer.get_type_name() != "Convolution" or any(
        any(layer.get_attributes()[name]) for name in ("pads_begin", "pads_end")
    ):
        return False
    most, weights = numbers(quantize.input_value(2)), numbers(layer.input_value(1))
    if most is None or most.size != 1 or weights is None:
        return False
    kept = layer.get_output_element_type(0).to_dtype()
    high = np.float32(most.reshape(-1)[0])
    source = quantize.input_value(0)
    if source.get_element_type().to_dtype() != np.float32:
        source = opset13.convert(source, np.float32).output(0)
    ends = [opset13.constant(np.float32(end)) for end in (-high, high, 0, 2 * high)]
    made = opset13.fake_quantize(source, *ends, _LEVELS)
    made.set_friendly_name(f"{quantize.get_friendly_name()}.shifted")
    layer.input(0).replace_source_output(
        (made if kept == np.float32 else opset13.convert(made, kept)).output(0)
    )
    shape = (1, -1, *[1] * (weights.ndim - 2))
    put_on = high * weights.astype(np.float64).sum(axis=tuple(range(1, weights.ndim)))
    readers = layer.output(0).get_target_inputs()
    less = opset13.add(layer, opset13.constant(-put_on.reshape(shape).astype(kept)))
    for reader in readers:
        reader.replace_source_output(less.output(0))
    return True


def _given(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Parameter")


def numbers(value: Any) -> NDArray[Any] | None:
    """What a constant comes to by the operators that make weights of 8 bits; None, if others."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.get_data())
    if kind not in (*_CHAIN, "Reshape"):
        return None
    found = numbers(node.input_value(0))
    if found is None:
        return None
    if kind == "Reshape":
        return found.reshape(tuple(node.get_output_shape(0)))
    if kind == "Convert":
        return found.astype(np.float32)
    other = numbers(node.input_value(1))
    if other is None:
        return None
    return found - other if kind == "Subtract" else found * other.astype(np.float32)
