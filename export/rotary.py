"""Rotation by halves of a head in place of neighbouring channels: the same numbers, less moving.

Flux rotates channels 0 and 1 of a head together, 2 and 3, and so on. Engines rotate the first half
of a head's channels with the second, and one that is asked for neighbours sorts them apart and back
again in every step. Queries and keys only ever meet in a product over all channels of a head, which
does not care for their order; so the layers that make both are written with their channels in the
order of halves (even ones first), and nothing is sorted while the graph runs. Only sums over a head
are taken in another order, so a result differs by their rounding.

Weights are sorted on their way from the shard to the file, one tensor at a time.

    >>> halves(model)       # how many attentions rotate by halves from now on
    6
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir

from export.weights import Numbers, lazy

_TURN: Final = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Sorted:
    """A node's input whose last axis holds heads of `size` channels each."""

    node: onnx_ir.Node
    index: int
    size: int


def halves(model: onnx_ir.Model) -> int:
    """Let every attention rotate by halves whose queries and keys come from layers of their own;
    how many do."""
    count = 0
    for attention in [node for node in model.graph if node.op_type == "Attention"]:
        rotations = [_rotation(value) for value in attention.inputs[:2]]
        found = [_layers(node) if node is not None else None for node in rotations]
        if any(places is None for places in found):
            continue
        for node, places in zip(rotations, found, strict=True):
            assert node is not None
            assert places is not None
            node.attributes["interleaved"] = onnx_ir.AttrInt64("interleaved", 0)
            for place in places:
                _sort(place)
        count += 1
    return count


def _rotation(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """What rotates one factor of an attention, of neighbours, and for nobody else."""
    node = _maker(value, "RotaryEmbedding")
    if node is None or len(node.outputs[0].uses()) != 1:
        return None
    told = node.attributes.get("interleaved")
    partly = node.attributes.get("rotary_embedding_dim")
    if told is None or told.as_int() != 1 or (partly is not None and partly.as_int()):
        return None
    return node


def _layers(rotation: onnx_ir.Node) -> list[_Sorted] | None:
    """All weights that a rotation's channels come from; None where there is anything else."""
    turned = _maker(rotation.inputs[0], "Transpose")
    if turned is None or list(turned.attributes["perm"].as_ints()) != _TURN:
        return None
    joined = _maker(turned.inputs[0], "Concat")
    made = [turned.inputs[0]] if joined is None else list(joined.inputs)
    found: list[_Sorted] = []
    for value in made:
        norm = _maker(value, "RMSNormalization")
        parted = _maker(norm.inputs[0], "Reshape") if norm is not None else None
        bias = _maker(parted.inputs[0], "Add") if parted is not None else None
        product = _maker(bias.inputs[0], "MatMul") if bias is not None else None
        nodes = [node for node in (norm, bias, product) if node is not None]
        weights = [node.inputs[1] for node in nodes]
        if len(nodes) < 3 or any(w is None or w.const_value is None for w in weights):
            return None
        assert weights[0] is not None
        size = int(weights[0].shape[0])  # type: ignore[index,arg-type]
        found += [_Sorted(node, 1, size) for node in nodes]
    return found


def _maker(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    """The node of a kind that makes a value, for one reader alone."""
    node = value.producer() if value is not None else None
    fits = node is not None and node.op_type == kind and len(node.outputs[0].uses()) == 1
    return node if fits else None


def _sort(place: _Sorted) -> None:
    """Even channels of each head first, then odd ones."""
    value, size = place.node.inputs[place.index], place.size
    assert value is not None
    whole = value.const_value
    assert whole is not None

    def read() -> Numbers:
        numbers = whole.numpy()
        # As plain integers of that width: numpy moves types that are not its own one by one.
        plain = numbers.view(f"u{numbers.dtype.itemsize}")
        paired = plain.reshape(*plain.shape[:-1], -1, size // 2, 2)
        sorted_ = np.swapaxes(paired, -1, -2).reshape(plain.shape)
        return np.ascontiguousarray(sorted_).view(numbers.dtype)

    if len(value.uses()) == 1:
        value.const_value = lazy(str(value.name), whole.dtype, whole.shape, read)
        return
    # Equal weights of several layers are one to the exporter, and the others may stay as they are.
    name = f"{value.name}.{place.node.name}"
    own = onnx_ir.Value(
        name=name,
        shape=onnx_ir.Shape(whole.shape),  # type: ignore[arg-type]
        type=onnx_ir.TensorType(whole.dtype),
        const_value=lazy(name, whole.dtype, whole.shape, read),
    )
    graph = place.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    graph.register_initializer(own)
    place.node.replace_input_with(place.index, own)
