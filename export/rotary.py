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
    """A tensor whose last axis holds heads of `size` channels each."""

    value: onnx_ir.Value
    size: int


def halves(model: onnx_ir.Model) -> int:
    """Let every attention rotate by halves whose queries and keys come from layers of their own;
    how many do."""
    count = 0
    for attention in [node for node in model.graph if node.op_type == "Attention"]:
        rotations = [_rotation(value) for value in attention.inputs[:2]]
        found = [_layers(node) if node is not None else None for node in rotations]
        if any(tensors is None for tensors in found):
            continue
        for node, tensors in zip(rotations, found, strict=True):
            assert node is not None
            assert tensors is not None
            node.attributes["interleaved"] = onnx_ir.AttrInt64("interleaved", 0)
            for tensor in tensors:
                _sort(tensor)
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
    """All tensors that a rotation's channels come from; None where any is not a layer's own."""
    turned = _maker(rotation.inputs[0], "Transpose")
    if turned is None or list(turned.attributes["perm"].as_ints()) != _TURN:
        return None
    joined = _maker(turned.inputs[0], "Concat")
    made = [turned.inputs[0]] if joined is None else list(joined.inputs)
    found: list[_Sorted] = []
    for value in made:
        norm = _maker(value, "RMSNormalization")
        scale = norm.inputs[1] if norm is not None else None
        if norm is None or scale is None or not _own(scale):
            return None
        size = int(scale.shape[0])  # type: ignore[index,arg-type]
        parted = _maker(norm.inputs[0], "Reshape")
        bias = _maker(parted.inputs[0], "Add") if parted is not None else None
        product = _maker(bias.inputs[0], "MatMul") if bias is not None else None
        tensors = [scale, *(node.inputs[1] for node in (bias, product) if node is not None)]
        if product is None or not all(_own(tensor) for tensor in tensors):
            return None
        found += [_Sorted(tensor, size) for tensor in tensors if tensor is not None]
    return found


def _maker(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _own(value: onnx_ir.Value | None) -> bool:
    """Whether a value is a weight that one node alone reads."""
    return value is not None and value.const_value is not None and len(value.uses()) == 1


def _sort(tensor: _Sorted) -> None:
    """Even channels of each head first, then odd ones."""
    whole, size = tensor.value.const_value, tensor.size
    assert whole is not None

    def read() -> Numbers:
        numbers = whole.numpy()
        # As plain integers of that width: numpy moves types that are not its own one by one.
        plain = numbers.view(f"u{numbers.dtype.itemsize}")
        paired = plain.reshape(*plain.shape[:-1], -1, size // 2, 2)
        sorted_ = np.swapaxes(paired, -1, -2).reshape(plain.shape)
        return np.ascontiguousarray(sorted_).view(numbers.dtype)

    tensor.value.const_value = lazy(str(tensor.value.name), whole.dtype, whole.shape, read)
