"""A graph as the preflight reads it: nodes with their tensors' types and shapes, without weights.

External weights stay on the disk; only numbers that a rule looks at (scales, zero points) are read.

    >>> graph = View.open(Path("bundles/mini/transformer/model.onnx"))
    >>> graph.type("hidden_states"), graph.shape("hidden_states")
    (1, ('batch', 'image_tokens', 64))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from dermaflux.errors import EngineError
from export.trt_data import faults

Shape = tuple[int | str | None, ...]
_VALUES = 1 << 20
"""Scales and zero points are vectors; a weight matrix is not read."""


@dataclass(frozen=True)
class Finding:
    """Something that keeps a graph from being built, or from running as it should; or, where it
    does not refuse, something to know of."""

    rule: str
    where: str
    message: str
    refuses: bool = True

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.message}"


@dataclass(frozen=True)
class View:
    """A model, and by name what makes, takes, types and shapes its tensors, those of subgraphs too.

    `light` is the model without large weights; `constants` are the weights and all that is
    computed of them alone.
    """

    path: Path
    model: ModelProto
    light: ModelProto
    weights: Mapping[str, TensorProto]
    makers: Mapping[str, NodeProto]
    takers: Mapping[str, list[NodeProto]]
    types: Mapping[str, int]
    shapes: Mapping[str, Shape]
    constants: frozenset[str]
    opset: int

    @classmethod
    def open(cls, path: Path) -> View:
        """Parse and type a graph.

        Raises:
            EngineError: it is not an ONNX graph, or its types contradict each other.
        """
        model = read(path)
        light = _light(model, path.parent)
        try:
            typed = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
            raise EngineError(f"{path} contradicts itself: {line(error)}") from error
        graph = model.graph
        opsets = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
        if not graph.output or not opsets:
            raise EngineError(f"{path} holds no graph")
        values = [v for g in _graphs(typed.graph) for v in (*g.value_info, *g.input, *g.output)]
        weights = {weight.name: weight for g in _graphs(graph) for weight in g.initializer}
        makers: dict[str, NodeProto] = {}
        takers: dict[str, list[NodeProto]] = {}
        constants = set(weights)
        for node in _nodes(graph):
            makers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                takers.setdefault(name, []).append(node)
            given = [name for name in node.input if name]
            inner = any(item.HasField("g") or item.graphs for item in node.attribute)
            known = given and constants.issuperset(given) and not inner
            if node.op_type == "Constant" or known:
                constants.update(node.output)
        # What inference does not reach, bodies of subgraphs, is typed by what nodes say.
        said = [(name, _says(node)) for node in _nodes(graph) for name in node.output[:1]]
        types: dict[str, int] = {}
        for name, kind in (*((v.name, v.type.tensor_type.elem_type) for v in values), *said):
            # Two branches may have one name for two tensors; the type that nothing takes stays.
            if kind == TensorProto.DOUBLE or not types.get(name):
                types[name] = kind
        return cls(
            path,
            model,
            light,
            weights,
            makers,
            takers,
            types | {name: weight.data_type for name, weight in weights.items()},
            {v.name: _shape(v) for v in values if v.type.tensor_type.HasField("shape")}
            | {name: tuple(weight.dims) for name, weight in weights.items()},
            frozenset(constants),
            opsets[0],
        )

    def nodes(self) -> Iterator[NodeProto]:
        """All nodes, those of subgraphs too."""
        yield from _nodes(self.model.graph)

    def tensors(self) -> Iterator[tuple[str, TensorProto]]:
        """All numbers that the model holds, by name: weights, and those that nodes are given."""
        yield from self.weights.items()
        for node in self.nodes():
            for item in node.attribute:
                for tensor in (*([item.t] if item.HasField("t") else ()), *item.tensors):
                    yield label(node), tensor

    def type(self, tensor: str) -> int:
        """ONNX's number of a tensor's type; 0 where it is not known."""
        return self.types.get(tensor, 0)

    def shape(self, tensor: str) -> Shape | None:
        """A tensor's axes, or None where not even their number is known."""
        return self.shapes.get(tensor)

    def values(self, tensor: str) -> NDArray[Any] | None:
        """The numbers of a small constant in float32 or int64; None where it is computed."""
        weight = self.weights.get(tensor)
        if weight is None:
            maker = self.makers.get(tensor)
            if maker is None or maker.op_type != "Constant":
                return None
            weight = attribute(maker, "value")
            if not isinstance(weight, TensorProto):
                return None
        if int(np.prod(weight.dims)) > _VALUES:
            return None
        if uses_external_data(weight):
            weight = TensorProto.FromString(weight.SerializeToString())
            if not _load(weight, self.path.parent):
                return None
        array = numpy_helper.to_array(weight)
        return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)


def read(path: Path) -> ModelProto:
    """Parse a graph, without its external weights.

    Raises:
        EngineError: it is not an ONNX graph.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EngineError(f"{path} is not a graph that ONNX reads: {line(error)}") from error


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute; texts as str."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def label(node: NodeProto) -> str:
    """How a node is named to people: `RotaryEmbedding rotary_embedding`."""
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '?')}"


def constant(graph: View, tensor: str) -> bool:
    """Whether a tensor is a weight, or one that is dequantized on the way."""
    maker = graph.makers.get(tensor)
    while maker is not None and maker.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
        tensor = maker.input[0]
        maker = graph.makers.get(tensor)
    return tensor in graph.weights or (maker is not None and maker.op_type == "Constant")


def _light(model: ModelProto, folder: Path) -> ModelProto:
    """The model as shape inference takes it: shapes read in, and large weights as inputs.

    It refuses numbers that are elsewhere, and copies large ones several times.
    """
    light = ModelProto()
    light.CopyFrom(model)
    inputs = {value.name for value in light.graph.input}
    for weight in list(light.graph.initializer):
        heavy = len(weight.raw_data) > _VALUES or int(np.prod(weight.dims)) > _VALUES
        if not heavy and uses_external_data(weight):
            heavy = not _load(weight, folder)
        # Inference would read past its end.
        heavy = heavy or any(faults(weight, folder))
        if heavy:
            if weight.name not in inputs:
                light.graph.input.append(
                    onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
                )
            light.graph.initializer.remove(weight)
    return light


def _load(weight: TensorProto, folder: Path) -> bool:
    """Read an external weight into itself; whether it could be."""
    if any(faults(weight, folder)):
        return False
    try:
        load_external_data_for_tensor(weight, str(folder))
    # A file that is missing, short or elsewhere is a finding of its own, by its name.
    except (OSError, ValueError, onnx.checker.ValidationError):
        return False
    weight.data_location = TensorProto.DEFAULT
    del weight.external_data[:]
    return True


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in (*([item.g] if item.HasField("g") else ()), *item.graphs):
                yield from _graphs(inner)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for one in _graphs(graph):
        yield from one.node


def _says(node: NodeProto) -> int:
    """The type that a node itself gives its output; 0 where it does not."""
    for name in ("to", "dtype"):
        kind = attribute(node, name)
        if isinstance(kind, int):
            return kind
    value = attribute(node, "value") if node.op_type == "Constant" else None
    return value.data_type if isinstance(value, TensorProto) else 0


def _shape(value: onnx.ValueInfoProto) -> Shape:
    axes = value.type.tensor_type.shape.dim
    return tuple(a.dim_value if a.HasField("dim_value") else a.dim_param or None for a in axes)


def line(error: Exception) -> str:
    """The first line of an error of ONNX, which may have many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
