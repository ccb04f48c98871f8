"""A graph as OpenVINO's CPU runs it fastest: outputs that nobody reads left out, 8 bits unsigned.

OpenVINO computes every output of a graph whenever it runs, so what only some calls need (a map of
attention: 14 % of a ViT-B/16) is left out before it is compiled.

Numbers in 8 bits are stored with a sign, as TensorRT takes them. A processor with AVX512-VNNI and
without AMX multiplies unsigned by signed bytes, and OpenVINO pays for a sign with an instruction
per number loaded: matrix products of a ViT-B/16 took 1.10 to 1.18 times as long. So the inputs of
layers are read as unsigned here, in equal steps, 127 standing for nought: -128 steps, which a
measured range never asks for, become -127, and there is one more above. Sums of integers are
exact; what differs is the rounding of what lies between two steps.

TensorRT wants a value rounded right before the product that takes it. OpenVINO fuses the rounding
with whatever made the value, unless that was turned or reshaped in between; so it is rounded first.
Pixels keep all their values (`dermaflux.engines.ov_pixels`).
What only some rows are read of is computed for these (`dermaflux.engines.ov_rows`), and an
attention whose values are in 8 bits has its weights in them too (`dermaflux.engines.ov_attention`).

    >>> model = read(core(), Path("model_int8.onnx"), outputs=("logits",))
    >>> unsigned(model)
    48
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from dermaflux.engines.ov_attention import keys_within, weights_in8
from dermaflux.engines.ov_nodes import changed
from dermaflux.engines.ov_pixels import shifted
from dermaflux.engines.ov_rows import one_row

_SIGNED: Final = (-128.0, 127.0)
_LEVELS: Final = 256
_MOVES: Final = ("Transpose", "Reshape")
_ON_THE_WAY: Final = ("Multiply", "Subtract", "Convert", "Transpose", "Reshape")
"""What stands between weights in 8 bits and the product that they are factors of."""


def read(core: Any, graph: Path, outputs: Iterable[str] | None = None, device: str = "CPU") -> Any:
    """A graph's model for a device; with `outputs` it computes these alone, in its own order. Names
    that it does not have are passed over."""
    model = core.read_model(str(graph))
    if outputs is not None:
        wanted = set(outputs)
        for result in model.get_results():
            if not wanted & set(result.input_value(0).get_names()):
                model.remove_result(result)
    if device == "CPU":
        if platform.machine().lower() in ("x86_64", "amd64"):
            unsigned(model)
            shifted(model)
        hoist(model)
        weights_in8(model)
        keys_within(model)
        one_row(model)
    return model


def unsigned(model: Any) -> int:
    """Read signed 8-bit inputs of layers with constant weights as unsigned; how many were.

    Those of other products keep their sign: nothing could be prepared for the 127 that stands for
    nought where both factors change. All become one operator, which can be moved.
    """
    return changed(model, "FakeQuantize", _unsign)


def hoist(model: Any) -> int:
    """Round values before they are turned or reshaped, where nobody reads them in between; how many
    were rounded earlier."""
    return changed(model, "FakeQuantize", _rounded_first)


def _rounded_first(quantize: Any) -> bool:
    if any(_number(quantize.input_value(index)) is None for index in range(1, 5)):
        return False
    moved: list[Any] = []
    value = quantize.input_value(0)
    while _moves(value) and len(value.get_target_inputs()) == 1:
        moved.append(value.get_node())
        value = moved[-1].input_value(0)
    if all(node.get_type_name() == "Convert" for node in moved):
        return False
    # What turns the value takes it in 8 bits; after it comes whoever read it.
    quantize.input(0).replace_source_output(_float(value))
    for user in quantize.output(0).get_target_inputs():
        user.replace_source_output(moved[0].output(0))
    moved[-1].input(0).replace_source_output(quantize.output(0))
    return True


def _moves(value: Any) -> bool:
    node = value.get_node()
    # A step from fp16 to fp32, which is what is rounded, changes nothing.
    widens = node.get_type_name() == "Convert" and node.get_output_element_type(0).to_dtype() == (
        np.float32
    )
    return widens or node.get_type_name() in _MOVES


def _float(value: Any) -> Any:
    from openvino import opset13

    if value.get_element_type().to_dtype() == np.float32:
        return value
    return opset13.convert(value, np.float32).output(0)


def _unsign(quantize: Any) -> bool:
    """One pair of QuantizeLinear and DequantizeLinear, which OpenVINO reads as FakeQuantize to
    -128..127, Convert, Convert, Subtract of nought, Multiply by the step; whether it was changed.
    """
    from openvino import opset13

    bounds = [_number(quantize.input_value(index)) for index in range(1, 5)]
    low, high, *steps = bounds
    if quantize.get_attributes()["levels"] != _LEVELS or tuple(steps) != _SIGNED:
        return False
    if low is None or high is None or low >= 0:
        return False
    last: Any = quantize
    for kind in ("Convert", "Convert", "Subtract", "Multiply"):
        found = _only_user(last, kind)
        if found is None and kind != "Subtract":
            return False
        last = found if found is not None else last
    users = list(last.output(0).get_target_inputs())
    if not users or not all(_product(user) for user in users):
        return False
    weighted = [_weighted(user) for user in users]
    if any(weighted) and not all(weighted):
        return False
    step = high / _SIGNED[1]
    source, kept = _float(quantize.input_value(0)), last.get_output_element_type(0).to_dtype()
    ends = [opset13.constant(np.float32(steps * step)) for steps in
            ((-127, 128) if weighted[0] else (-128, 127))]  # fmt: skip
    made = opset13.fake_quantize(source, *ends, *ends, _LEVELS)
    made.set_friendly_name(
        f"{quantize.get_friendly_name()}.{'unsigned' if weighted[0] else 'signed'}"
    )
    if kept != np.float32:
        made = opset13.convert(made, kept)
    for user in users:
        user.replace_source_output(made.output(0))
    return True


def _number(value: Any) -> float | None:
    node = value.get_node()
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().reshape(-1)[0])


def _only_user(node: Any, kind: str) -> Any | None:
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1 or users[0].get_index() != 0:
        return None
    user = users[0].get_node()
    return user if user.get_type_name() == kind else None


def _product(place: Any) -> bool:
    return bool(place.get_node().get_type_name() == "MatMul")


def _weighted(place: Any) -> bool:
    """Whether an input is the first of a matrix product whose second is weights."""
    if not _product(place) or place.get_index() != 0:
        return False
    factor = place.get_node().input_value(1).get_node()
    while factor.get_type_name() in _ON_THE_WAY:
        factor = factor.input_value(0).get_node()
    return bool(factor.get_type_name() == "Constant")
