"""Attention of a vision transformer, said the way that OpenVINO runs it fastest in 8 bits.

timm makes queries, keys and values in one product [B, N, 3 D] and takes them apart afterwards,
which costs two passes over memory that no arithmetic pays for. Here they are three products over
the same input, whose results go into the attention as they are, and the attention is spelled out:
products, a factor, a softmax. Queries, keys and values are in 8 bits where their ranges are known,
and with the values what the softmax makes, whose range is one: TensorRT takes both factors of a
product in 8 bits or none. Neither is where there are more tokens than an even row has steps for.
Symmetric ones have 127 steps for what has no sign; OpenVINO rounds to
255 as it reads the file (`dermaflux.engines.ov_attention`).

    >>> names = split(model)                    # before `export.quantized`
    >>> in8(model, names, "int8", seen)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from export.quantized import FACTORS, Channels, Place, constant, node_before, pair
from export.weights import lazy

_PARTED: Final = [2, 0, 3, 1, 4]
"""How timm turns [B, N, 3, heads, size]: the three first."""
_TAKES: Final = {"query": ("scores", 0), "key": ("scores", 1), "value": ("mixed", 1)}
"""Which product of the attention takes a factor, and as which of its inputs."""
_LARGEST_WEIGHT: Final = 1.0
"""That a softmax can make."""
_MOST_TOKENS: Final = 254
"""Whose even weights are half of 127 steps; those of more would all be rounded to nought."""


def split(model: onnx_ir.Model) -> tuple[str, ...]:
    """Say every attention with its three products apart; the names of their layers as they were.

    Each becomes `NAME.query`, `NAME.key` and `NAME.value`. An attention of another form (queries
    that are normalised) stays as it is.
    """
    parted = []
    for node in tuple(model.graph):
        product = _product(node) if node.op_type == "Attention" else None
        if product is not None:
            parted.append((product, _apart(node, product)))
    common.RemoveUnusedNodesPass()(model)
    for product, sums in parted:
        # A map of attention reads all three as they were.
        if product.graph is not None:
            place = Place(product, str(product.name))
            rest = sums[0].dtype or onnx_ir.DataType.FLOAT
            together = node_before(place, "Concat", sums, rest, None, "together", axis=-1)
            _sum(product).outputs[0].replace_all_uses_with(together)
    common.RemoveUnusedNodesPass()(model)
    return tuple(str(product.name) for product, _ in parted)


def known(names: Sequence[str], seen: Channels) -> Channels:
    """Ranges by layer, of the layers that `split` made too: their input is one and the same."""
    return {
        **seen,
        **{f"{name}.{x}": seen[name] for name in names if name in seen for x in FACTORS},
    }


def in8(model: onnx_ir.Model, names: Sequence[str], kind: str, seen: Channels) -> int:
    """Put queries, keys and values through 8 bits where `seen` has their ranges; how many there
    were."""
    products = {str(node.name): node for node in model.graph if node.op_type == "MatMul"}
    count = 0
    for name in names:
        attention = name.removesuffix(".qkv")
        for what, (taker, index) in _TAKES.items():
            product = products[f"{attention}.{taker}.MatMul"]
            largest, source = seen.get(f"{attention}.{what}"), product.inputs[index]
            if largest is None or source is None or (what == "value" and not _few(product)):
                continue
            made = pair(Place(product, f"{name}.{what}.made"), source, float(largest.max()), kind)
            product.replace_input_with(index, made)
            count += 1
            weights = product.inputs[0]
            if what == "value" and weights is not None:
                place = Place(product, f"{name}.weights.made")
                product.replace_input_with(0, pair(place, weights, _LARGEST_WEIGHT, kind))
    return count


def _few(mixed: onnx_ir.Node) -> bool:
    """Whether rows of weights are known to be short enough for 8 bits."""
    shape = mixed.outputs[0].shape
    tokens = None if shape is None else shape[2]
    return isinstance(tokens, int) and tokens <= _MOST_TOKENS


def _product(attention: onnx_ir.Node) -> onnx_ir.Node | None:
    """The product that an attention's three inputs are parts of, if they are timm's."""
    # The fourth is what is added to the scores; a cache would come after it.
    if any(value is not None for value in attention.inputs[4:]):
        return None
    found = []
    for value in attention.inputs[:3]:
        for kind in ("Squeeze", "Slice", "Transpose", "Reshape", "Add", "MatMul"):
            maker = value.producer() if value is not None else None
            if maker is None or maker.op_type != kind:
                return None
            if kind == "Transpose" and list(maker.attributes["perm"].as_ints()) != _PARTED:
                return None
            value = maker.inputs[0]
        assert maker is not None
        found.append(maker)
    weight = found[0].inputs[1]
    plain = weight is not None and weight.const_value is not None
    return found[0] if plain and found[0] is found[1] is found[2] else None


def _sum(product: onnx_ir.Node) -> onnx_ir.Node:
    """The addition of a layer's bias."""
    (use,) = product.outputs[0].uses()
    return use.node


def _reshape(attention: onnx_ir.Node) -> onnx_ir.Node:
    """Where the three become heads; there may be others, of maps."""
    maker: onnx_ir.Node | None = None
    value = attention.inputs[0]
    for _ in range(4):
        assert value is not None
        maker = value.producer()
        assert maker is not None
        value = maker.inputs[0]
    assert maker is not None
    return maker


def _apart(attention: onnx_ir.Node, product: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Feed an attention from three products of its own; what they are with their biases."""
    added = _sum(product)
    reshape = _reshape(attention)
    shape = reshape.inputs[1]
    assert shape is not None
    assert shape.const_value is not None
    heads, size = (int(number) for number in shape.const_value.numpy()[-2:])
    source, weight, bias = product.inputs[0], product.inputs[1], added.inputs[1]
    assert source is not None
    assert weight is not None
    assert bias is not None
    place = Place(product, str(product.name))
    rest = weight.dtype or onnx_ir.DataType.FLOAT
    into = constant(place, f"{place.stem}.heads", np.array([0, -1, heads, size]), _INDEX)
    sums, made = [], []
    for number, what in enumerate(FACTORS):
        own = Place(product, f"{place.stem}.{what}")
        part = slice(number * heads * size, (number + 1) * heads * size)
        factors = [_columns(own, value, part) for value in (weight, bias)]
        whole = node_before(own, "MatMul", [source, factors[0]], rest, None, "product")
        maker = whole.producer()
        assert maker is not None
        maker.name = own.stem
        biased = node_before(own, "Add", [whole, factors[1]], rest, None, "sum")
        sums.append(biased)
        made.append(node_before(own, "Reshape", [biased, into], rest, None, "heads"))
    query, key, value = (
        _turned(Place(product, f"{place.stem}.{what}"), x, [0, 2, 1, 3], rest)
        for what, x in zip(FACTORS, made, strict=True)
    )
    across = _turned(Place(attention, f"{place.stem}.key.across"), made[1], [0, 2, 3, 1], rest)
    told = attention.attributes.get("scale")
    factor = 1 / math.sqrt(size) if told is None else told.as_float()
    own = Place(attention, place.stem.removesuffix(".qkv"))
    by = constant(own, f"{own.stem}.factor", np.array(factor), rest)
    scores = node_before(own, "MatMul", [query, across], rest, None, "scores")
    scaled = node_before(own, "Mul", [scores, by], rest, None, "scaled")
    if len(attention.inputs) > 3 and attention.inputs[3] is not None:
        scaled = node_before(own, "Add", [scaled, attention.inputs[3]], rest, None, "weighted")
    weights = node_before(own, "Softmax", [scaled], rest, None, "weights", axis=-1)
    mixed = node_before(own, "MatMul", [weights, value], rest, attention.outputs[0].shape, "mixed")
    attention.outputs[0].replace_all_uses_with(mixed)
    for old, new in zip(tuple(attention.inputs[:3]), (query, key, value), strict=True):
        assert old is not None
        old.replace_all_uses_with(new)
    return sums


_INDEX: Final = onnx_ir.DataType.INT64


def _turned(
    place: Place, value: onnx_ir.Value, order: list[int], rest: onnx_ir.DataType
) -> onnx_ir.Value:
    return node_before(place, "Transpose", [value], rest, None, "turned", perm=order)


def _columns(place: Place, value: onnx_ir.Value, part: slice) -> onnx_ir.Value:
    """Some of the outputs of a layer's weights or bias, read when the file is written."""
    whole = value.const_value
    assert whole is not None
    shape = [*list(whole.shape)[:-1], part.stop - part.start]
    suffix = "weight" if len(shape) > 1 else "bias"

    def read() -> NDArray[Any]:
        return np.ascontiguousarray(whole.numpy()[..., part])

    tensor = lazy(f"{place.stem}.{suffix}", whole.dtype, shape, read)
    made = onnx_ir.Value(
        name=tensor.name,
        shape=onnx_ir.Shape(shape),
        type=onnx_ir.TensorType(whole.dtype),
        const_value=tensor,
    )
    graph = place.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    graph.register_initializer(made)
    return made
