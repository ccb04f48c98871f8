"""Whether a graph is ONNX at all: by its checker, and by the types that its operators take.

A tensor's type is inferred and then compared with what the graph says of it, and a graph may say
nothing: the checker then passes a product of FP16 and FP32, and FP8 in an opset that has none.

    >>> [finding.message for finding in check(View.open(Path("model.onnx")))]
    ['its B is float and its A float16; the standard wants one']
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto

from export.trt_graph import Finding, View, label, line

_STANDARD = ("", "ai.onnx")


def check(graph: View) -> list[Finding]:
    """What the standard forbids and the graph does."""
    found = []
    try:
        onnx.checker.check_model(graph.light, full_check=True)
    # Both of its steps have errors of their own; a text that is no UTF-8 is a ValueError.
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
    ) as error:
        found.append(Finding("standard", graph.path.name, line(error)))
    for node in graph.nodes():
        if node.domain in _STANDARD:
            found += [Finding("standard", label(node), message) for message in _schema(graph, node)]
    for weight in graph.model.graph.sparse_initializer:
        found.append(
            Finding("standard", weight.values.name, "is a sparse weight; TensorRT takes none")
        )
    return found


def _schema(graph: View, node: NodeProto) -> Iterator[str]:
    """The operator is there in this opset, and takes these attributes; each input is of a type
    that it takes, and of the same where the schema has one name for both."""
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    except onnx.defs.SchemaError:
        yield f"opset {graph.opset} has no {node.op_type}"
        return
    # The checker lets them pass where an operator is a function of others.
    for item in node.attribute:
        if item.name not in schema.attributes:
            yield f"has an attribute {item.name!r}; opset {graph.opset} has none of that name"
    taken = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    bound: dict[str, tuple[str, str]] = {}
    for index, name in enumerate(node.input):
        if not name or not schema.inputs:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        kind = graph.type(name)
        if kind == 0 or kind not in TensorProto.DataType.values():
            continue
        text, variable = TensorProto.DataType.Name(kind).lower(), formal.type_str
        if f"tensor({text})" not in taken.get(variable, (f"tensor({text})",)):
            yield f"its {formal.name} is {text}; opset {graph.opset} takes none there"
        elif variable in taken and formal.is_homogeneous:
            other, same = bound.setdefault(variable, (formal.name, text))
            if same != text:
                yield f"its {formal.name} is {text} and its {other} {same}; the standard wants one"
