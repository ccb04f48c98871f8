"""Where TensorRT wants QuantizeLinear and DequantizeLinear, and what becomes of them elsewhere.

TensorRT quantizes explicitly: it does what the pairs say, where they stand as its documents ask,
and computes in high precision, without a word, where they do not. Both are findings here.

    int8   symmetric; activations one scale; weights one scale, or one per output channel
    fp8    E4M3; activations and weights one scale each: a scale per channel builds, and the
           product then runs in high precision (seen in the plan's inspector by the project
           NVIDIA/TensorRT-Model-Connect, whose dense fusion takes scalars only)

Sources: product documentation of TensorRT, "Explicit Quantization" and class IQuantizeLayer; the
import of QuantizeLinear in the sources of project onnx/onnx-tensorrt for 10.15.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from export.trt_graph import Finding, View, attribute, label, read
from export.trt_support import TYPES

PRODUCTS: Final = ("MatMul", "Gemm", "Conv")
FACTORS: Final[Mapping[str, int]] = {**dict.fromkeys(PRODUCTS, 2), "Attention": 3}
"""Operator -> how many of its inputs, from the first, it multiplies."""
_EIGHT_BITS: Final = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
_SCALES: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_PRECISIONS: Final = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def check(graph: View, precision: str | None = None) -> list[Finding]:
    """What is wrong with a graph's quantization; nothing where there is none, unless `precision`
    is `int8` or `fp8` and none of its products is in it."""
    found: list[Finding] = []
    for node in graph.nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += [Finding("quantization", label(node), m) for m in _pair(graph, node)]
        elif node.op_type in FACTORS:
            found += [Finding("quantization", label(node), m) for m in _product(graph, node)]
    found += _weight_only(graph)
    if precision in _PRECISIONS:
        wanted = _PRECISIONS[precision]
        products = [n for n in graph.nodes() if n.op_type in PRODUCTS]
        if not any(_kind(graph, node.input[1]) == wanted for node in products):
            found.append(
                Finding(
                    "quantization",
                    graph.path.name,
                    f"is called {precision} and has no product in it among {len(products)}",
                )
            )
    return found


def both_factors(path: Path) -> int:
    """How many products of a graph are done in 8 bits: all of their factors are dequantized.

    Layers whose weights alone are in 8 bits run in high precision, and are not counted.

    Raises:
        EngineError: it is not an ONNX graph.
    """
    nodes = read(path).graph.node
    made = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    return sum(node.op_type in FACTORS and made.issuperset(_factors(node)) for node in nodes)


def _pair(graph: View, node: NodeProto) -> Iterator[str]:
    """Scale, zero point and neighbour of one QuantizeLinear or DequantizeLinear."""
    quantize = node.op_type == "QuantizeLinear"
    quantized = node.output[0] if quantize else node.input[0]
    kind = graph.type(quantized)
    if kind not in _EIGHT_BITS:
        name = TYPES.get(kind, TensorProto.DataType.Name(kind) if kind else "unknown")
        hint = "; write it signed, with zero point 0" if kind == TensorProto.UINT8 else ""
        yield f"{quantized} is {name}; TensorRT takes INT8 and FP8{hint}"
    if attribute(node, "block_size", 0):
        yield f"block_size {attribute(node, 'block_size')}; INT8 and FP8 have scales per axis only"
    if not quantize:
        yield from _placed(graph, node)
    scale = graph.values(node.input[1])
    if scale is None:
        yield f"its scale {node.input[1]} is computed; a static scale is a constant"
        return
    yield from _scale(graph, node, scale)
    zero = graph.values(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2]:
        if zero is None:
            yield f"its zero point {node.input[2]} is computed; it is a constant 0"
        elif zero.any():
            yield f"its zero point is {zero.flat[int(zero.astype(bool).argmax())]}; only 0 is taken"
        elif zero.size != scale.size:
            yield f"has {zero.size} zero points for {scale.size} scales"
    if quantize and not _weight(graph, node.input[0]):
        if scale.size != 1:
            yield f"an activation with {scale.size} scales; TensorRT takes one for all of it"
        if graph.type(node.input[0]) != graph.type(node.input[1]):
            yield (
                f"quantizes {_name(graph, node.input[0])} with a scale in "
                f"{_name(graph, node.input[1])}; a strongly typed network wants the same type"
            )
        yield from _followed(graph, node, scale)


def _scale(graph: View, node: NodeProto, scale: NDArray[Any]) -> Iterator[str]:
    if graph.type(node.input[1]) not in _SCALES:
        yield f"its scale is {_name(graph, node.input[1])}; TensorRT takes FP32, FP16 and BF16"
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "has a scale that is not a positive number"
    if scale.ndim > 1:
        yield f"its scale has {scale.ndim} axes; one scale, or a vector of one per channel"
    shape = graph.shape(node.input[0])
    if scale.size > 1 and shape is not None:
        axis = attribute(node, "axis", 1)
        if not -len(shape) <= axis < len(shape):
            yield f"its axis {axis} is none of {len(shape)}"
        elif isinstance(shape[axis], int) and shape[axis] != scale.size:
            yield f"has {scale.size} scales for {shape[axis]} channels of axis {axis}"


def _placed(graph: View, node: NodeProto) -> Iterator[str]:
    """What is dequantized was a weight or quantized just before, and is multiplied at once.

    With anything between, TensorRT computes that and the product in high precision.
    """
    source, output = node.input[0], node.output[0]
    maker = graph.makers.get(source)
    if source not in graph.constants and (maker is None or maker.op_type != "QuantizeLinear"):
        yield f"takes {source}, which is neither a weight nor quantized just before"
    takers = graph.takers.get(output, [])
    if output in {value.name for value in graph.model.graph.output}:
        yield "is an output of the graph; only a product takes what is dequantized"
    elif not takers:
        yield "goes into nothing; only a product takes what is dequantized"
    for taker in takers:
        factors = _factors(taker)
        if output not in factors or output in list(taker.input)[len(factors) :]:
            yield (
                f"goes into {label(taker)}, which does not multiply it; a product behind that "
                f"runs in high precision. It belongs right before one of {', '.join(FACTORS)}"
            )


def _followed(graph: View, node: NodeProto, scale: NDArray[Any]) -> Iterator[str]:
    """What is quantized is dequantized at once, by the same scale: else there is no pair."""
    takers = graph.takers.get(node.output[0], [])
    others = [taker for taker in takers if taker.op_type != "DequantizeLinear"]
    if not takers or others:
        what = label(others[0]) if others else "nothing"
        yield f"goes into {what}; a DequantizeLinear has to follow"
    for taker in takers:
        if taker.op_type == "DequantizeLinear":
            other = graph.values(taker.input[1])
            if other is None or not np.array_equal(other, scale):
                yield f"{label(taker)} has another scale; the two of a pair have the same"


def _product(graph: View, node: NodeProto) -> Iterator[str]:
    """All factors in 8 bits of one kind, or the weights alone, or none."""
    kinds = [_kind(graph, name) for name in _factors(node)]
    if len(kinds) < FACTORS[node.op_type]:
        return
    if node.op_type == "Attention":
        if len(set(kinds)) > 1:
            yield "has factors of several kinds; query, key and value are of one, in 8 bits or high"
        return
    if kinds[1] and not kinds[0] and not _weight(graph, graph.makers[node.input[1]].input[0]):
        yield f"{node.input[0]} is not quantized, the other factor is, and is no weight"
    if kinds[0] and not kinds[1]:
        yield f"{node.input[1]} is not quantized, the other factor is; that saves nothing"
    if 0 in kinds:
        return
    if kinds[0] != kinds[1]:
        yield f"multiplies {TYPES[kinds[0]]} by {TYPES[kinds[1]]}; TensorRT wants one kind"
    for index, name in enumerate(node.input[:2]):
        dequantize = graph.makers[name]
        scale = graph.values(dequantize.input[1])
        if scale is None or scale.size == 1:
            continue
        if kinds[index] == TensorProto.FLOAT8E4M3FN:
            yield (
                f"{name} has {scale.size} scales in FP8; TensorRT builds it and runs the product "
                "in high precision. Use one scale"
            )
        shape = graph.shape(dequantize.input[0])
        if shape is None or index == 0:
            continue
        rank, axis = len(shape), attribute(dequantize, "axis", 1)
        channel = _channel(node, rank)
        if axis % rank != channel:
            yield (
                f"{name} has its scales along axis {axis}; those of the output channels are along "
                f"axis {channel}, others cannot be taken out of the sum"
            )


def _weight_only(graph: View) -> Iterator[Finding]:
    """Weights in 8 bits and activations not: smaller, not faster, and it builds."""
    products = [node for node in graph.nodes() if node.op_type in PRODUCTS]
    alone = [
        node for node in products if not _kind(graph, node.input[0]) and _kind(graph, node.input[1])
    ]
    if alone:
        yield Finding(
            "weight-only",
            label(alone[0]),
            f"{len(alone)} of {len(products)} products have weights in 8 bits and no activations: "
            "they run in high precision, with dequantized weights",
            refuses=False,
        )


def _channel(node: NodeProto, rank: int) -> int:
    """The axis of the output channels in the second factor."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def _factors(node: NodeProto) -> list[str]:
    """The inputs that a node multiplies; none where it is no product."""
    return list(node.input)[: FACTORS.get(node.op_type, 0)]


def _kind(graph: View, tensor: str) -> int:
    """The 8-bit type that a tensor was dequantized from; 0 for any other tensor."""
    maker = graph.makers.get(tensor)
    if maker is None or maker.op_type != "DequantizeLinear":
        return 0
    kind = graph.type(maker.input[0])
    return kind if kind in _EIGHT_BITS else 0


def _weight(graph: View, tensor: str) -> bool:
    maker = graph.makers.get(tensor)
    return tensor in graph.weights or (maker is not None and maker.op_type == "Constant")


def _name(graph: View, tensor: str) -> str:
    return TYPES.get(graph.type(tensor), "an unknown type")
