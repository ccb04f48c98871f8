"""A graph in fp32 -> the same graph in bf16 or fp16, with float32 at its borders.

Weights are rounded on their way from the shard to the file. Graph inputs and outputs stay float32:
ONNX Runtime refuses arrays of bf16 from numpy, and OpenVINO misreads them. What a sine or cosine is
taken of stays float32 too: a timestep of 999 has no bf16, and an angle of 64 radians no digits. So
does a batch normalisation that no convolution took up: its variances may be beyond fp16.
Norms and softmax compute in float32 inside, as their operators say (`stash_type`).

The pass is our own, and not onnxconverter's or ModelOpt's AutoCast, because both load the weights.

In fp16 the sum that ends a block of Flux is clipped to its largest number, as diffusers clips it
(`transformer_flux.py`): a few channels of FLUX.1 grow past it. Engines that compute fp16 in fp32 do
not show what happens without: on a GPU, no image.

>>> lower(model, RECIPES["bf16"]["transformer"])
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir
from onnx_ir.passes import common

from export.recipes import Recipe, matches
from export.trace import RESIDUAL
from export.weights import cast

_FLOAT: Final = onnx_ir.DataType.FLOAT
_MOST_FP16: Final = 65504.0
_ANGLES: Final = ("Sin", "Cos")
_HIGH: Final = (*_ANGLES, "BatchNormalization")
_FLOAT_ALWAYS: Final = {("Resize", 2), ("Resize", 1)}
"""Inputs that an operator takes in float32 whatever its other inputs are."""


def lower(model: onnx_ir.Model, recipe: Recipe) -> onnx_ir.Model:
    """The graph with the recipe's types; the model is changed, and returned."""
    if recipe.rest == "float32":
        return model
    kind = {"bfloat16": onnx_ir.DataType.BFLOAT16, "float16": onnx_ir.DataType.FLOAT16}[recipe.rest]
    graph = model.graph
    floats = {value for value in _values(graph) if value.dtype == _FLOAT}
    high = _high(graph, recipe)
    casts: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}
    lowered = {
        output for node in graph if node not in high for output in node.outputs if output in floats
    }
    for node in tuple(graph):
        wanted = _FLOAT if node in high else kind
        for index, value in enumerate(node.inputs):
            if value is None or value not in floats:
                continue
            needed = _FLOAT if (node.op_type, index) in _FLOAT_ALWAYS else wanted
            have = kind if value in lowered else _FLOAT
            if have != needed:
                node.replace_input_with(index, _as(graph, node, value, needed, casts))
        if node not in high:
            _retype(node, kind)
    if recipe.rest == "float16":
        _clip(graph)
    for value in lowered:
        # Not `value.dtype`, which would change the type that copies of the graph share.
        value.type = onnx_ir.TensorType(kind)
    for index, output in enumerate(tuple(graph.outputs)):
        if output in lowered:
            _restore(graph, index, output)
    common.RemoveUnusedNodesPass()(model)
    for (value, _), made in casts.items():
        # A weight that nobody reads in float32 any more keeps its name.
        if made.is_initializer() and value.name not in graph.initializers:
            graph.initializers.pop(str(made.name))
            made.name = value.name
            graph.register_initializer(made)
    return model


def _high(graph: onnx_ir.Graph, recipe: Recipe) -> set[onnx_ir.Node]:
    """Nodes that compute in float32: the recipe's, and whatever leads to an angle."""
    found = {
        node
        for node in graph
        if node.op_type in _HIGH
        or (recipe.low and node.op_type not in recipe.low)
        or matches(str(node.name), recipe.high)
    }
    behind = [node for node in found if node.op_type in _ANGLES]
    while behind:
        for value in behind.pop().inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker not in found:
                found.add(maker)
                behind.append(maker)
    return found


def _as(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    value: onnx_ir.Value,
    kind: onnx_ir.DataType,
    casts: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value],
) -> onnx_ir.Value:
    """A value in another type: a weight is rounded in the file, everything else by a Cast."""
    if (value, kind) in casts:
        return casts[value, kind]
    suffix = kind.name.lower()
    if value.is_initializer():
        assert value.const_value is not None
        made = onnx_ir.Value(
            name=f"{value.name}_{suffix}",
            shape=value.shape,
            type=onnx_ir.TensorType(kind),
            const_value=cast(value.const_value, kind),
        )
        graph.register_initializer(made)
    else:
        convert = onnx_ir.node("Cast", [value], {"to": int(kind)}, name=f"{value.name}.{suffix}")
        made = convert.outputs[0]
        made.name, made.type, made.shape = (
            f"{value.name}_{suffix}",
            onnx_ir.TensorType(kind),
            value.shape,
        )
        graph.insert_before(node, convert)
    casts[value, kind] = made
    return made


def _retype(node: onnx_ir.Node, kind: onnx_ir.DataType) -> None:
    """A node that says float32 in an attribute says the other type."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == int(_FLOAT):
        node.attributes["to"] = onnx_ir.AttrInt64("to", int(kind))
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == _FLOAT:
            rounded = onnx_ir.Tensor(tensor.numpy().astype(kind.numpy()), dtype=kind)
            node.attributes["value"] = onnx_ir.AttrTensor("value", rounded)


def _clip(graph: onnx_ir.Graph) -> None:
    """Put a Clip behind every block's last sum."""
    for node in tuple(graph):
        if not str(node.name).endswith(f".{RESIDUAL}"):
            continue
        total = node.outputs[0]
        bounds = []
        for what, bound in (("least", -_MOST_FP16), ("most", _MOST_FP16)):
            tensor = onnx_ir.Tensor(np.array(bound, np.float16), name=f"{node.name}.{what}")
            value = onnx_ir.Value(
                name=tensor.name,
                shape=onnx_ir.Shape([]),
                type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16),
                const_value=tensor,
            )
            graph.register_initializer(value)
            bounds.append(value)
        clip = onnx_ir.node("Clip", [total, *bounds], name=f"{node.name}.clip")
        made = clip.outputs[0]
        made.name, made.shape = f"{total.name}_clipped", total.shape
        made.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
        total.replace_all_uses_with(made)
        # That changed the Clip's own input as well.
        clip.replace_input_with(0, total)
        graph.insert_after(node, clip)


def _restore(graph: onnx_ir.Graph, index: int, output: onnx_ir.Value) -> None:
    """An output of the graph in float32, under its own name."""
    name = output.name
    output.name = f"{name}_inside"
    convert = onnx_ir.node("Cast", [output], {"to": int(_FLOAT)}, name=f"{name}.float")
    made = convert.outputs[0]
    made.name, made.type, made.shape = name, onnx_ir.TensorType(_FLOAT), output.shape
    graph.append(convert)
    graph.outputs[index] = made


def _values(graph: onnx_ir.Graph) -> list[onnx_ir.Value]:
    return [
        *graph.inputs,
        *graph.initializers.values(),
        *(output for node in graph for output in node.outputs),
    ]
