"""What SiLU gives, in 8 bits of OpenVINO's CPU: in half as large steps.

x * sigmoid(x) is never below -0.2785. Files store 8 bits with a sign and as many steps below nought
as above, as TensorRT takes them, so of such values half of the steps are never used. A CPU
multiplies unsigned bytes too, and convolutions there take a nought that is any byte; so the
range that the file was calibrated to is divided into all 256 of them, and the largest error of
rounding becomes half of what the file asks for.

    >>> onesided(core().read_model("model_int8.onnx"))
    20
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from dermaflux.engines.ov_nodes import changed

LEAST: Final = -0.27846455
"""The least that SiLU gives, at -1.2784645: 1 + x = -exp(x) there."""
_SIGNED: Final = (-128.0, 127.0)
_LEVELS: Final = 256


def onesided(model: Any) -> int:
    """Read what SiLU gives to convolutions, in signed 8 bits, as unsigned; how many places were."""
    return changed(model, "FakeQuantize", _onesided)


def bounds(largest: float) -> tuple[float, float]:
    """What the first and the last of 256 equal steps stand for: nought is one of them, `LEAST` is
    not cut, and neither is `largest`."""
    step = (largest - LEAST) / (_LEVELS - 2)
    below = math.ceil(-LEAST / step)
    return -below * step, (_LEVELS - 1 - below) * step


def _onesided(quantize: Any) -> bool:
    """One pair of QuantizeLinear and DequantizeLinear, which OpenVINO reads as FakeQuantize to
    -128..127, Convert, Convert, Subtract of nought, Multiply by the step; whether it was changed.
    """
    from openvino import opset13

    ends = [_number(quantize.input_value(index)) for index in range(1, 5)]
    source = quantize.input_value(0)
    if (
        quantize.get_attributes()["levels"] != _LEVELS
        or tuple(ends[2:]) != _SIGNED
        or ends[1] is None
        or source.get_element_type().to_dtype() != np.float32
        or not _silu(source.get_node())
    ):
        return False
    last: Any = quantize
    for kind in ("Convert", "Convert", "Subtract", "Multiply"):
        users = list(last.output(0).get_target_inputs())
        if len(users) == 1 and users[0].get_node().get_type_name() == kind:
            last = users[0].get_node()
        elif kind != "Subtract":
            return False
    users = list(last.output(0).get_target_inputs())
    if last.get_output_element_type(0).to_dtype() != np.float32 or not all(
        user.get_node().get_type_name() == "Convolution" and user.get_index() == 0 for user in users
    ):
        return False
    low, high = (opset13.constant(np.float32(end)) for end in bounds(ends[1]))
    made = opset13.fake_quantize(source, low, high, low, high, _LEVELS)
    made.set_friendly_name(f"{quantize.get_friendly_name()}.onesided")
    for user in users:
        user.replace_source_output(made.output(0))
    return True


def _silu(node: Any) -> bool:
    """Whether a node is x * sigmoid(x), in one operator or in two."""
    if node.get_type_name() == "Swish":
        return bool(node.get_input_size() == 1)
    if node.get_type_name() != "Multiply":
        return False
    pairs = ((node.input_value(0), node.input_value(1)), (node.input_value(1), node.input_value(0)))
    return any(
        gate.get_node().get_type_name() == "Sigmoid" and gate.get_node().input_value(0) == value
        for value, gate in pairs
    )


def _number(value: Any) -> float | None:
    node = value.get_node()
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().reshape(-1)[0])
