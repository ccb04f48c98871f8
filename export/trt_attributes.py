"""Limits of TensorRT's ONNX parser on attributes, shapes and outputs, operator by operator.

What the support matrix of project onnx/onnx-tensorrt lists beside an operator's types, and its
static checkers refuse, for the operators that our graphs have or are likely to get. An attribute
that is written out with its default is no finding.

    >>> list(RULES["Attention"](graph, node))
    ['softcap 30.0; TensorRT takes none']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from onnx import NodeProto, TensorProto

from export.trt_graph import View, attribute, constant


def _attention(graph: View, node: NodeProto) -> Iterator[str]:
    for name in ("softcap", "qk_matmul_output_mode"):
        if attribute(node, name, 0) != 0:
            yield f"{name} {attribute(node, name)}; TensorRT takes none"
    if attribute(node, "softmax_precision") is not None:
        yield "softmax_precision is set; TensorRT takes none"
    for index, name in enumerate(("Q", "K", "V", "attn_mask")):
        if _given(node, index) and _rank(graph, node.input[index]) not in (None, 4):
            yield f"{name} has {_rank(graph, node.input[index])} axes; TensorRT takes 4"
    if any(_given(node, index) for index in range(4, len(node.input))):
        yield "past keys or lengths are given; TensorRT takes none"
    if any(node.output[1:]):
        yield "has more outputs than the first; TensorRT gives none of them"


def _rotary(graph: View, node: NodeProto) -> Iterator[str]:
    if _rank(graph, node.input[0]) not in (None, 4):
        yield f"its input has {_rank(graph, node.input[0])} axes; TensorRT takes 4"
    needed = 2 if _given(node, 3) else 3
    for index, name in ((1, "cosines"), (2, "sines")):
        if _rank(graph, node.input[index]) not in (None, needed):
            yield f"{name} have {_rank(graph, node.input[index])} axes; TensorRT takes {needed}"
    if _given(node, 3) and graph.type(node.input[3]) != TensorProto.INT64:
        yield "position_ids are not INT64"


def _one_output(graph: View, node: NodeProto) -> Iterator[str]:
    if any(node.output[1:]):
        yield "has more outputs than the first; TensorRT gives none of them"


def _resize(graph: View, node: NodeProto) -> Iterator[str]:
    for name, default, taken in (
        ("mode", "nearest", ("nearest", "linear")),
        (
            "coordinate_transformation_mode",
            "half_pixel",
            ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric",
             "align_corners"),
        ),
        (
            "nearest_mode",
            "round_prefer_floor",
            ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        ),
        ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
        ("antialias", 0, (0,)),
    ):  # fmt: skip
        value = attribute(node, name, default)
        if value not in taken:
            yield f"{name} {value!r}; TensorRT takes {', '.join(map(str, taken))}"


def _axes_known(graph: View, node: NodeProto) -> Iterator[str]:
    if _given(node, 1) and not constant(graph, node.input[1]):
        yield f"its axes {node.input[1]} are computed; TensorRT wants a constant"


def _scatter(graph: View, node: NodeProto) -> Iterator[str]:
    if attribute(node, "reduction", "none") != "none":
        yield f"reduction {attribute(node, 'reduction')!r}; TensorRT takes none"


RULES: Final[Mapping[str, Callable[[View, NodeProto], Iterator[str]]]] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "LayerNormalization": _one_output,
    "MaxPool": _one_output,
    "BatchNormalization": _one_output,
    "Resize": _resize,
    "ScatterND": _scatter,
    "Squeeze": _axes_known,
    "Unsqueeze": _axes_known,
    **{f"Reduce{kind}": _axes_known for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean",
                                                 "Min", "Prod", "Sum", "SumSquare")},
}  # fmt: skip
"""Operator -> limits beyond its types, as the support matrix lists them."""


def _rank(graph: View, tensor: str) -> int | None:
    shape = graph.shape(tensor)
    return None if shape is None else len(shape)


def _given(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])
