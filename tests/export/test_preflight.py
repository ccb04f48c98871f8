"""The preflight passes our graphs, and finds every way of breaking one that we know of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from dermaflux.bundle import Bundle
from dermaflux.engines.parts import _PARTS
from dermaflux.engines.trt_plan import Range
from dermaflux.errors import EngineError
from export import trt_support, trt_tensors
from export.compile import main
from export.preflight import check, check_versions
from export.trt_profile import profile
from export.trt_support import OLDEST, support, versions

NEW = "11.4"
FP8 = TensorProto.FLOAT8E4M3FN


def weight(name: str, array: Any, kind: int | None = None) -> TensorProto:
    """An initializer; `kind` where numpy has no such type."""
    values = np.asarray(array)
    if kind is None:
        return numpy_helper.from_array(values, name)
    return helper.make_tensor(name, kind, values.shape, values.ravel())


def graph(kind: int = TensorProto.INT8) -> ModelProto:
    """A block of a transformer in small, with one product in 8 bits: nothing is wrong with it."""
    random = np.random.default_rng(0)
    per_channel = kind == TensorProto.INT8
    scales = np.full(8, 0.01, np.float32) if per_channel else np.float32(0.01)
    zeros = np.zeros(8) if per_channel else np.float64(0)
    names = ["hidden_states", "txt_ids"]
    node = helper.make_node
    nodes = [
        node("RMSNormalization", ["hidden_states", "norm"], ["normed"], "normalize", axis=-1),
        node("QuantizeLinear", ["normed", "x_scale", "x_zero"], ["x_q"], "quantize"),
        node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x"], "dequantize"),
        node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], "weights", axis=1),
        node("MatMul", ["x", "w"], ["product"], "product"),
        node("Reshape", ["product", "heads"], ["split"], "split", allowzero=0),
        node("Transpose", ["split"], ["q"], "turn", perm=[0, 2, 1, 3]),
        node("RotaryEmbedding", ["q", "cos", "sin"], ["turned"], "rotate", interleaved=1),
        node("Attention", ["turned", "turned", "q"], ["mixed"], "attend", softcap=0.0),
        node("Transpose", ["mixed"], ["joined"], "turn_back", perm=[0, 2, 1, 3]),
        node("Reshape", ["joined", "width"], ["flat"], "join"),
        node("LayerNormalization", ["flat", "norm"], ["centred"], "centre", axis=-1),
        node("Sin", ["txt_ids"], ["angles"], "sine"),
        node("ReduceSum", ["angles", "axes"], ["sum"], "sum", keepdims=0),
        node("Add", ["centred", "sum"], ["out_hidden_states"], "add"),
    ]
    weights = [
        weight("norm", np.ones(8, np.float32)),
        weight("x_scale", np.float32(0.02)),
        weight("x_zero", np.float64(0), kind),
        weight("w_q", random.integers(-100, 100, (8, 8)), kind),
        weight("w_scale", scales),
        weight("w_zero", zeros, kind),
        weight("heads", np.array([0, 0, 2, 4])),
        weight("width", np.array([0, 0, 8])),
        weight("cos", np.ones((1, 6, 2), np.float32)),
        weight("sin", np.zeros((1, 6, 2), np.float32)),
        weight("axes", np.array([0, 1])),
    ]
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "block",
            [
                value(names[0], TensorProto.FLOAT, ["batch", 6, 8]),
                value(names[1], TensorProto.FLOAT, [6, 3]),
            ],
            [value("out_hidden_states", TensorProto.FLOAT, ["batch", 6, 8])],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )


PROFILE = {
    "hidden_states": Range((1, 6, 8), (1, 6, 8), (4, 6, 8)),
    "txt_ids": Range((6, 3), (6, 3), (6, 3)),
}


def found(model: ModelProto, tmp_path: Path, version: str = NEW, **more: Any) -> list[str]:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return [str(finding) for finding in check(path, version, **more)]


def by_name(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def put(model: ModelProto, new: TensorProto) -> None:
    """Replace an initializer, or add one."""
    for old in model.graph.initializer:
        if old.name == new.name:
            model.graph.initializer.remove(old)
    model.graph.initializer.append(new)


def between(model: ModelProto, tensor: str, operator: str, **attributes: Any) -> NodeProto:
    """Put a node behind a tensor: whoever took that takes the new node's output."""
    output = f"{tensor}_{operator}"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == tensor:
                node.input[index] = output
    new = helper.make_node(operator, [tensor], [output], output, **attributes)
    places = [i for i, node in enumerate(model.graph.node) if tensor in node.output]
    index = places[0] + 1 if places else 0
    model.graph.node.insert(index, new)
    return model.graph.node[index]


@pytest.mark.parametrize("kind", [TensorProto.INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("version", [v for v in versions() if v not in ("10.13", "10.14")])
def test_a_sound_graph_passes(tmp_path, kind, version):
    precision = "int8" if kind == TensorProto.INT8 else "fp8"
    assert found(graph(kind), tmp_path, version, profile=PROFILE, precision=precision) == []


def test_our_graphs_pass_on_every_version_that_we_say(exported: Bundle):
    for part, content in exported.parts.items():
        for precision, file in content.files.items():
            path = exported.file(file.path)
            asked = versions()[versions().index(OLDEST) :]
            result = check_versions(path, asked, profile(exported, part), precision, part)
            refused = {v: [str(f) for f in r if f.refuses] for v, r in result.items()}
            assert not any(refused.values()), (part, precision, refused)


def test_older_versions_are_told_what_they_lack(exported: Bundle):
    path = exported.file(exported.parts["transformer"].files["fp32"].path)
    result = check_versions(path, ["10.13", "10.14"])

    def lacked(version: str) -> set[str]:
        return {str(f).split()[1] for f in result[version] if f.rule == "operator"}

    assert lacked("10.13") == {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert lacked("10.14") == {"RMSNormalization", "RotaryEmbedding"}


# --- what tracing leaves behind ---------------------------------------------------------------


def _sequence(model: ModelProto) -> None:
    node = helper.make_node
    model.graph.initializer.append(weight("first", np.int64(0)))
    model.graph.node.insert(
        0, node("SplitToSequence", ["hidden_states"], ["parts"], "cut", axis=2, keepdims=1)
    )
    model.graph.node.insert(1, node("SequenceAt", ["parts", "first"], ["part"], "pick"))


def _cast_like(model: ModelProto) -> None:
    between(model, "normed", "CastLike").input.append("norm")


def _double_table(model: ModelProto) -> None:
    put(model, weight("cos", np.ones((1, 6, 2), np.float64)))
    between(model, "cos", "Cast", to=TensorProto.FLOAT)


def _double_sum(model: ModelProto) -> None:
    between(model, "txt_ids", "Cast", to=TensorProto.DOUBLE)
    between(model, "angles", "Cast", to=TensorProto.FLOAT)


def _turned_weight(model: ModelProto) -> None:
    between(model, "w", "Transpose", perm=[1, 0])


def _turned_behind(*operators: str) -> Callable[[ModelProto], None]:
    """A weight behind a Transpose, with others between the two."""

    def edit(model: ModelProto) -> None:
        put(model, weight("square", np.eye(8, dtype=np.float32)))
        put(model, weight("first", np.array([0])))
        put(model, weight("sizes", np.array([8, 8])))
        by_name(model, "product").input[1] = tensor = "square"
        for operator in operators:
            more = {"Reshape": ["sizes"], "Unsqueeze": ["first"], "Squeeze": ["first"]}
            node = between(model, tensor, operator)
            node.input.extend(more.get(operator, []))
            tensor = node.output[0]
        between(model, tensor, "Transpose", perm=[1, 0])
        for name in ("weights", "quantize", "dequantize"):
            model.graph.node.remove(by_name(model, name))
        by_name(model, "product").input[0] = "normed"

    return edit


def _branch(*nodes: NodeProto, weights: Any = ()) -> Callable[[ModelProto], None]:
    """An If whose first branch takes `normed` and gives `branch`."""

    def edit(model: ModelProto) -> None:
        value = helper.make_tensor_value_info
        taken = [value("branch", TensorProto.FLOAT, None)]
        other = [value("other", TensorProto.FLOAT, None)]
        same = helper.make_node("Identity", ["normed"], ["other"])
        put(model, weight("condition", np.array(True)))
        between(model, "normed", "If").input[0] = "condition"
        node = by_name(model, "normed_If")
        first = helper.make_graph(list(nodes), "then", [], taken, list(weights))
        second = helper.make_graph([same], "else", [], other)
        node.attribute.append(helper.make_attribute("then_branch", first))
        node.attribute.append(helper.make_attribute("else_branch", second))

    return edit


_double_in_a_branch = _branch(
    helper.make_node("Cast", ["normed"], ["wide"], "widen", to=TensorProto.DOUBLE),
    helper.make_node("Sqrt", ["wide"], ["root"], "root"),
    helper.make_node("Cast", ["root"], ["branch"], "narrow", to=TensorProto.FLOAT),
)
_double_weight_in_a_branch = _branch(
    helper.make_node("Cast", ["one"], ["narrow"], "narrow", to=TensorProto.FLOAT),
    helper.make_node("Mul", ["normed", "narrow"], ["branch"], "times"),
    weights=[weight("one", np.float64(1))],
)
_double_constant_in_a_branch = _branch(
    helper.make_node("Constant", [], ["one"], "one", value=weight("one", np.float64(1))),
    helper.make_node("Cast", ["one"], ["narrow"], "narrow", to=TensorProto.FLOAT),
    helper.make_node("Mul", ["normed", "narrow"], ["branch"], "times"),
)
_turned_in_a_branch = _branch(
    helper.make_node("Transpose", ["inner"], ["turned_inner"], "turn_inner", perm=[1, 0]),
    helper.make_node("MatMul", ["normed", "turned_inner"], ["branch"], "times"),
    weights=[weight("inner", np.eye(8, dtype=np.float32))],
)


def _double_in_one_of_two_branches(model: ModelProto) -> None:
    """The other branch has a float of the same name."""
    _double_in_a_branch(model)
    other = by_name(model, "normed_If").attribute[1].g
    other.node[0].output[0] = "wide"
    other.node.append(helper.make_node("Cast", ["wide"], ["other"], to=TensorProto.FLOAT))
    other.node[0].op_type = "Cast"
    other.node[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def _output_of_another_part(model: ModelProto) -> None:
    model.graph.output[0].name = by_name(model, "add").output[0] = "sample"


def _input_of_another_part(model: ModelProto) -> None:
    model.graph.input[1].name = by_name(model, "sine").input[0] = "latent_sample"


def _output_name(model: ModelProto) -> None:
    model.graph.output[0].name = by_name(model, "add").output[0] = "linear_503"


def _input_name(model: ModelProto) -> None:
    model.graph.input[1].name = by_name(model, "sine").input[0] = "arg_7"


def _half_output(model: ModelProto) -> None:
    between(model, "out_hidden_states", "Cast", to=TensorProto.FLOAT16)
    by_name(model, "add").output[0] = "sum_of_both"
    cast = by_name(model, "out_hidden_states_Cast")
    cast.input[0], cast.output[0] = "sum_of_both", "out_hidden_states"
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _custom(operator: str, domain: str) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        between(model, "normed", operator).domain = domain
        model.opset_import.append(helper.make_opsetid(domain, 1))

    return edit


def _opset(model: ModelProto) -> None:
    model.opset_import[0].version = 25


def _function(model: ModelProto) -> None:
    domain = "own"
    node = helper.make_node("Relu", ["a"], ["b"])
    opset = helper.make_opsetid("", 23)
    model.functions.append(helper.make_function(domain, "Twice", ["a"], ["b"], [node], [opset]))


def _unsupported(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Det", ["cos_2"], ["none"], "det"))
    model.graph.initializer.append(weight("cos_2", np.eye(3, dtype=np.float32)))


def _wrong_type(model: ModelProto) -> None:
    put(model, weight("ints", np.ones(3, np.int32)))
    model.graph.node.append(helper.make_node("MatMul", ["ints", "ints"], ["none"], "integers"))


@pytest.mark.parametrize(
    ("edit", "rule", "words"),
    [
        (_sequence, "leftover", "SequenceAt pick"),
        (_sequence, "leftover", "SplitToSequence cut"),
        (_sequence, "operator", "has no SplitToSequence"),
        (_cast_like, "leftover", "CastLike"),
        (_double_table, "type", "cos: DOUBLE; TensorRT computes none"),
        (_double_sum, "type", "DOUBLE"),
        (_turned_weight, "leftover", "turns the weight w;"),
        (_turned_behind("Identity"), "leftover", "turns the weight square_Identity;"),
        (_turned_behind("Reshape"), "leftover", "turns the weight"),
        (_turned_behind("Unsqueeze", "Squeeze"), "leftover", "turns the weight"),
        (_turned_behind("Neg", "Identity"), "leftover", "turns the weight"),
        (_turned_in_a_branch, "leftover", "Transpose turn_inner: turns the weight inner"),
        (_double_in_a_branch, "type", "Sqrt root: wide: DOUBLE"),
        (_double_in_one_of_two_branches, "type", "Sqrt root: wide: DOUBLE"),
        (_double_weight_in_a_branch, "type", "one: DOUBLE"),
        (_double_constant_in_a_branch, "type", "one: DOUBLE"),
        (_output_of_another_part, "name", "sample: is no output of transformer; it has out_hidden"),
        (_input_of_another_part, "name", "hidden_states, latent_sample: are inputs of no one part"),
        (_output_name, "name", "linear_503: is no output of a bundle"),
        (_input_name, "name", "arg_7: is no input of a bundle"),
        (_half_output, "type", "the output is FP16"),
        (_custom("TRT_FP8QuantizeLinear", "trt"), "domain", "'trt'.* as QuantizeLinear instead"),
        (_custom("FusedMatMul", "com.microsoft"), "domain", "'com.microsoft'; only standard"),
        (_opset, "opset", "opset 25; TensorRT 11.4 takes 9 to 24"),
        (_function, "function", "Twice"),
        (_unsupported, "operator", "TensorRT 11.4 has no Det; no version"),
        (_wrong_type, "type", "ints is INT32; TensorRT takes BF16, FP16, FP32"),
    ],
)
def test_what_the_parser_refuses_is_found(tmp_path, edit, rule, words):
    model = graph()
    edit(model)
    lines = [line for line in found(model, tmp_path) if line.startswith(f"{rule}: ")]
    assert any(re.search(words, line) for line in lines), found(model, tmp_path)


def test_a_branch_that_is_sound_passes(tmp_path):
    model = graph()
    _branch(helper.make_node("Relu", ["normed"], ["branch"]))(model)
    assert found(model, tmp_path, profile=PROFILE, precision="int8") == []


def test_names_are_those_of_the_part(tmp_path, exported: Bundle):
    for part, content in exported.parts.items():
        names = trt_tensors.PARTS[part]
        assert {tensor.name for tensor in content.inputs} == set(names.inputs)
        assert {tensor.name for tensor in content.outputs} == set(names.outputs)
    for part, module in _PARTS.items():
        ours = trt_tensors.PARTS[part]
        assert (ours.inputs, ours.outputs) == (module.inputs, module.outputs)
    path = exported.file(exported.parts["text_encoder_2"].files["fp32"].path)
    lines = [str(f) for f in check(path, NEW, part="text_encoder")]
    assert lines == ["name: pooler_output: is an output of text_encoder, and the graph has none"]
    lines = [str(f) for f in check(path, NEW, part="vae_decoder")]
    assert "name: last_hidden_state: is no output of vae_decoder; it has sample" in lines


# --- what is no ONNX --------------------------------------------------------------------------


def _old_opset(version: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        model.opset_import[0].version = version

    return edit


def _half_by_float(model: ModelProto) -> None:
    put(model, weight("half", np.eye(8, dtype=np.float16)))
    by_name(model, "product").input[1] = "half"
    for name in ("weights", "quantize", "dequantize"):
        model.graph.node.remove(by_name(model, name))
    by_name(model, "product").input[0] = "normed"


def _third_factor(model: ModelProto) -> None:
    by_name(model, "product").input.append("norm")


def _sparse(model: ModelProto) -> None:
    tensors = weight("thin", np.ones(1, np.float32)), weight("places", np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(*tensors, [3]))


def test_a_newer_version_takes_a_newer_opset(tmp_path):
    model = graph()
    _opset(model)
    assert not any("opset" in line for line in found(model, tmp_path, "11.5"))


# --- attributes -------------------------------------------------------------------------------


def _attribute(node: str, name: str, value: Any) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        found = by_name(model, node)
        kept = [item for item in found.attribute if item.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def _attention_of_three_axes(model: ModelProto) -> None:
    node = by_name(model, "attend")
    node.input[0] = node.input[1] = node.input[2] = "product"
    node.attribute.append(helper.make_attribute("q_num_heads", 2))
    node.attribute.append(helper.make_attribute("kv_num_heads", 2))
    by_name(model, "turn_back").op_type = "Identity"
    del by_name(model, "turn_back").attribute[:]


def _more_outputs(node: str) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        by_name(model, node).output.append("second")

    return edit


def _attention_scores(model: ModelProto) -> None:
    by_name(model, "attend").output.extend(["", "", "scores"])


def _rotary_by_position(model: ModelProto) -> None:
    """Positions with caches that have a batch, which goes with none."""
    by_name(model, "rotate").input.append("positions")
    model.graph.initializer.append(weight("positions", np.zeros((1, 6), np.int64)))


def _resize(**attributes: Any) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        model.graph.initializer.append(weight("scales", np.float32([1, 1, 2, 2])))
        node = helper.make_node("Resize", ["q", "", "scales"], ["big"], "resize", **attributes)
        model.graph.node.append(node)

    return edit


def _computed_axes(model: ModelProto) -> None:
    by_name(model, "sum").input[1] = "computed"
    node = helper.make_node("Shape", ["axes"], ["computed"], "shape")
    model.graph.node.insert(0, node)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_attribute("attend", "softcap", 30.0), "softcap 30.0; TensorRT takes none"),
        (_attribute("attend", "qk_matmul_output_mode", 1), "qk_matmul_output_mode 1"),
        (_attribute("attend", "softmax_precision", 1), "softmax_precision is set"),
        (_attention_of_three_axes, "Q has 3 axes; TensorRT takes 4"),
        (_attention_scores, "has more outputs than the first"),
        (_more_outputs("centre"), "LayerNormalization centre: has more outputs"),
        (_rotary_by_position, "cosines have 3 axes; TensorRT takes 2"),
        (_resize(mode="cubic"), "mode 'cubic'; TensorRT takes nearest, linear"),
        (_resize(mode="linear", antialias=1), "antialias 1"),
        (_resize(coordinate_transformation_mode="tf_crop_and_resize"), "tf_crop_and_resize"),
        (_computed_axes, "axes computed are computed"),
    ],
)
def test_attributes_beyond_the_matrix_are_found(tmp_path, edit, words):
    model = graph()
    edit(model)
    lines = [line for line in found(model, tmp_path) if line.startswith(("attribute", "file"))]
    assert any(line.startswith("attribute") and words in line for line in lines), lines


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_old_opset(22), "opset 22 has no Attention"),
        (_half_by_float, "its B is float16 and its A float"),
        (_third_factor, "input size 3"),
        (_attribute("centre", "foo", 1), "has an attribute 'foo'"),
        (_attribute("join", "foo", 1), "Unrecognized attribute: foo"),
        (_sparse, "thin: is a sparse weight"),
    ],
)
def test_what_the_standard_forbids_is_found(tmp_path, edit, words):
    """Whatever the graph says of its tensors, it says nothing here."""
    model = graph()
    del model.graph.value_info[:]
    edit(model)
    lines = [line for line in found(model, tmp_path) if line.startswith("standard: ")]
    assert any(words in line for line in lines), found(model, tmp_path)


@pytest.mark.parametrize("version", [13, 18])
def test_an_opset_without_fp8_is_found(tmp_path, version):
    """Only quantization is left of the graph: the rest came later."""
    model = graph(FP8)
    kept = {"quantize", "dequantize", "weights", "product"}
    for node in list(model.graph.node):
        if node.name not in kept:
            model.graph.node.remove(node)
    by_name(model, "quantize").input[0] = "hidden_states"
    by_name(model, "product").output[0] = "out_hidden_states"
    del model.graph.input[1:]
    assert found(model, tmp_path) == []
    _old_opset(version)(model)
    lines = found(model, tmp_path)
    assert any("DequantizeLinear weights: its x is float8e4m3fn" in line for line in lines), lines


def test_a_resize_that_tensorrt_takes_is_no_finding(tmp_path):
    model = graph()
    _resize(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")(
        model
    )
    assert found(model, tmp_path) == []


# --- quantization -----------------------------------------------------------------------------


def _weights(**arrays: tuple[Any, int | None]) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        for name, (array, kind) in arrays.items():
            put(model, weight(name, array, kind))

    return edit


def _unsigned(model: ModelProto) -> None:
    put(model, weight("x_zero", np.uint8(0)))


def _one_factor(model: ModelProto) -> None:
    by_name(model, "product").input[0] = "normed"


def _one_weight(model: ModelProto) -> None:
    put(model, weight("plain", np.ones((8, 8), np.float32)))
    by_name(model, "product").input[1] = "plain"


def _other_scale(model: ModelProto) -> None:
    put(model, weight("other", np.float32(0.05)))
    by_name(model, "dequantize").input[1] = "other"


def _unfollowed(model: ModelProto) -> None:
    between(model, "x_q", "Identity")


def _dead_end(model: ModelProto) -> None:
    node = helper.make_node("QuantizeLinear", ["normed", "x_scale", "x_zero"], ["end"], "lost")
    model.graph.node.append(node)


def _computed_scale(model: ModelProto) -> None:
    between(model, "x_scale", "Exp")


def _wrong_axis(model: ModelProto) -> None:
    _attribute("weights", "axis", 0)(model)


def _mixed(model: ModelProto) -> None:
    put(model, weight("w_q", np.ones((8, 8)), FP8))
    put(model, weight("w_zero", np.zeros(8), FP8))


def _half_scale(model: ModelProto) -> None:
    """Opset 23 lets a float be quantized by a half scale."""
    for name in ("quantize", "dequantize"):
        by_name(model, name).input[1] = "half"
    put(model, weight("half", np.float16(0.02)))
    between(model, "x", "Cast", to=TensorProto.FLOAT)


def _gemm(axis: int) -> Callable[[ModelProto], None]:
    """A product with its weights turned, as linear layers over vectors have them."""

    def edit(model: ModelProto) -> None:
        node = helper.make_node
        model.graph.initializer.append(weight("pick", np.array(0)))
        model.graph.node.extend(
            [
                node("Gather", ["normed", "pick"], ["row"], "row", axis=0),
                node("QuantizeLinear", ["row", "x_scale", "x_zero"], ["row_q"], "row_quantize"),
                node("DequantizeLinear", ["row_q", "x_scale", "x_zero"], ["row_x"], "row_x"),
                node(
                    "DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["turned_w"], "turned_w",
                    axis=axis,
                ),
                node("Gemm", ["row_x", "turned_w"], ["none"], "linear", transB=1),
            ]
        )  # fmt: skip

    return edit


def _behind(tensor: str, operator: str, **attributes: Any) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        between(model, tensor, operator, **attributes)

    return edit


def _pair_behind_a_product(model: ModelProto) -> None:
    """What comes out of a product is rounded, and no product takes that."""
    names = ["x_scale", "x_zero"]
    for node in model.graph.node:
        node.input[:] = ["rounded" if name == "product" else name for name in node.input]
    at = list(model.graph.node).index(by_name(model, "product")) + 1
    for name, source, output in (
        ("Dequantize", "product_q", "rounded"),
        ("Quantize", "product", "product_q"),
    ):
        node = helper.make_node(f"{name}Linear", [source, *names], [output], f"late_{name}")
        model.graph.node.insert(at, node)


def _dequantized_output(model: ModelProto) -> None:
    node = by_name(model, "dequantize")
    by_name(model, "add").output[0] = "lost"
    node.output[0] = by_name(model, "product").input[0] = "out_hidden_states"


def _not_quantized_before(model: ModelProto) -> None:
    node = by_name(model, "quantize")
    node.op_type = "Cast"
    del node.input[1:]
    node.attribute.append(helper.make_attribute("to", TensorProto.INT8))


def _factors(*places: int) -> Callable[[ModelProto], None]:
    """Some of what attention multiplies is in 8 bits."""

    def edit(model: ModelProto) -> None:
        node = by_name(model, "attend")
        at = list(model.graph.node).index(node)
        for place in places:
            source, names = node.input[place], ["x_scale", "x_zero"]
            node.input[place] = f"f{place}"
            pair = [
                helper.make_node("QuantizeLinear", [source, *names], [f"q{place}"], f"fq{place}"),
                helper.make_node("DequantizeLinear", [f"q{place}", *names], [f"f{place}"]),
            ]
            for one in reversed(pair):
                model.graph.node.insert(at, one)

    return edit


SCALES = np.full(8, 0.02, np.float32)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_unsigned, "x_q is UINT8; TensorRT takes INT8 and FP8; write it signed"),
        (_weights(x_zero=(np.int8(3), None)), "its zero point is 3; only 0 is taken"),
        (
            _weights(x_scale=(SCALES, None), x_zero=(np.zeros(8), TensorProto.INT8)),
            "an activation with 8 scales",
        ),
        (_weights(x_scale=(np.float32(0), None)), "not a positive number"),
        (_weights(x_scale=(np.float32("nan"), None)), "not a positive number"),
        (_weights(w_scale=(-SCALES, None)), "not a positive number"),
        (_weights(w_zero=(np.zeros(1), TensorProto.INT8)), "has 1 zero points for 8 scales"),
        (
            _weights(w_scale=(SCALES[:4], None), w_zero=(np.zeros(4), TensorProto.INT8)),
            "has 4 scales for 8 channels of axis 1",
        ),
        (_one_weight, "plain is not quantized, the other factor is"),
        (_other_scale, "dequantize has another scale"),
        (_unfollowed, "goes into Identity"),
        (_dead_end, "QuantizeLinear lost: goes into nothing"),
        (_computed_scale, "its scale x_scale_Exp is computed"),
        (_wrong_axis, "those of the output channels are along axis 1"),
        (_gemm(1), "those of the output channels are along axis 0"),
        (_mixed, "multiplies INT8 by FP8"),
        (_behind("x", "Relu"), "goes into Relu x_Relu, which does not multiply it"),
        (_behind("x", "Transpose", perm=[0, 1, 2]), "goes into Transpose x_Transpose"),
        (_behind("x", "Softmax"), "goes into Softmax x_Softmax"),
        (_behind("x", "Identity"), "goes into Identity x_Identity"),
        (_behind("w", "Neg"), "goes into Neg w_Neg"),
        (_pair_behind_a_product, "goes into Reshape split, which does not multiply it"),
        (_one_factor, "DequantizeLinear dequantize: goes into nothing"),
        (_dequantized_output, "is an output of the graph"),
        (_not_quantized_before, "takes x_q, which is neither a weight nor quantized"),
        (_factors(0, 1), "Attention attend: has factors of several kinds"),
        (_half_scale, "quantizes FP32 with a scale in FP16"),
    ],
)
def test_quantization_that_tensorrt_does_not_do_is_found(tmp_path, edit, words):
    model = graph()
    edit(model)
    lines = [line for line in found(model, tmp_path) if line.startswith("quantization: ")]
    assert any(words in line for line in lines), found(model, tmp_path)


def test_weights_alone_in_8_bits_are_a_note(tmp_path):
    model = graph()
    _one_factor(model)
    for name in ("quantize", "dequantize"):
        model.graph.node.remove(by_name(model, name))
    onnx.save(model, tmp_path / "model.onnx")
    notes = check(tmp_path / "model.onnx", NEW, PROFILE, "int8")
    assert [(f.rule, f.refuses) for f in notes] == [("weight-only", False)]
    assert main(["--check", str(tmp_path / "model.onnx")]) == 0


def test_attention_in_8_bits_passes(tmp_path):
    model = graph()
    _factors(0, 1, 2)(model)
    assert found(model, tmp_path) == []


def test_scales_along_the_output_channels_of_turned_weights_pass(tmp_path):
    model = graph()
    _gemm(0)(model)
    assert found(model, tmp_path) == []


def test_fp8_with_a_scale_per_channel_is_found_to_be_inactive(tmp_path):
    model = graph(FP8)
    put(model, weight("w_scale", SCALES))
    put(model, weight("w_zero", np.zeros(8), FP8))
    assert any("builds it and runs the product in high precision" in line
               for line in found(model, tmp_path))  # fmt: skip


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E4M3FNUZ])
def test_other_kinds_of_fp8_are_found(tmp_path, kind):
    assert any(
        f"{TensorProto.DataType.Name(kind)}; TensorRT has no such type" in line
        for line in found(graph(kind), tmp_path)
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_graph_that_is_called_quantized_and_is_not_is_found(tmp_path, precision):
    model = graph()
    node = by_name(model, "product")
    put(model, weight("plain", np.ones((8, 8), np.float32)))
    node.input[0], node.input[1] = "normed", "plain"
    for name in ("quantize", "dequantize", "weights"):
        model.graph.node.remove(by_name(model, name))
    assert found(model, tmp_path) == []
    words = f"is called {precision} and has no product in it among 1"
    assert any(words in line for line in found(model, tmp_path, precision=precision))


def test_int8_that_is_called_fp8_is_found(tmp_path):
    lines = found(graph(), tmp_path, precision="fp8")
    assert lines == ["quantization: model.onnx: is called fp8 and has no product in it among 1"]


# --- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_states": None}, "hidden_states: has no shapes in the profile"),
        ({"timestep": Range((1,), (1,), (4,))}, "timestep: has shapes in the profile and is no"),
        ({"txt_ids": Range((6,), (6,), (6,))}, "txt_ids: has 2 axes, its profile 1"),
        ({"txt_ids": Range((6, 3), (6, 3), (9, 3))}, "axis 0 is fixed to 6"),
        ({"hidden_states": Range((4, 6, 8), (1, 6, 8), (4, 6, 8))}, "goes (4, 1, 4)"),
        ({"hidden_states": Range((0, 6, 8), (1, 6, 8), (4, 6, 8))}, "goes (0, 1, 4)"),
    ],
)
def test_shapes_outside_of_the_profile_are_found(tmp_path, change, words):
    shapes = {name: r for name, r in {**PROFILE, **change}.items() if r is not None}
    lines = found(graph(), tmp_path, profile=shapes)
    assert any(line.startswith("profile: ") and words in line for line in lines), lines


def test_one_axis_in_two_inputs_has_one_range(tmp_path):
    model = graph()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch"
    lines = found(model, tmp_path, profile={**PROFILE, "txt_ids": Range((1, 3), (1, 3), (2, 3))})
    assert any("batch goes (1, 1, 2), and (1, 1, 4) in hidden_states" in line for line in lines)


# --- files ------------------------------------------------------------------------------------


def _external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(graph(), path, save_as_external_data=True, location="model.onnx.data",
              size_threshold=0)  # fmt: skip
    return path


def test_weights_beside_the_graph_pass(tmp_path):
    assert check(_external(tmp_path), NEW, PROFILE, "int8") == []


def test_missing_short_and_outlying_weights_are_found(tmp_path):
    path = _external(tmp_path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    assert any(f.rule == "data" and "ends at byte" in f.message for f in check(path, NEW))
    data.unlink()
    assert any(f.rule == "data" and "is missing" in f.message for f in check(path, NEW))
    model = onnx.load(path, load_external_data=False)
    for place in ("../model.onnx.data", "/etc/passwd"):
        entries = model.graph.initializer[0].external_data
        next(e for e in entries if e.key == "location").value = place
        path.write_bytes(model.SerializeToString())
        assert any(f"lies at {place!r}, outside" in f.message for f in check(path, NEW))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("length", "4", "says 4 bytes and its shape needs"),
        ("length", "9999", "ends at byte"),
        ("length", "-4", "has the length '-4'"),
        ("length", "x", "has the length 'x'"),
        ("offset", "abc", "has the offset 'abc'"),
        ("offset", "-4096", "has the offset '-4096'"),
        ("offset", "1.5", "has the offset '1.5'"),
        ("location", "", "lies at ''"),
    ],
)
@pytest.mark.parametrize("name", ["norm", "heads"])
def test_places_that_are_none_are_found(tmp_path, name, key, value, words):
    """Of a weight that is looked at only by its shape, and of one that shapes are inferred from."""
    path = _external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    tensor = next(weight for weight in model.graph.initializer if weight.name == name)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    path.write_bytes(model.SerializeToString())
    lines = [str(finding) for finding in check(path, NEW) if finding.refuses]
    assert any(line.startswith(f"data: {name}: ") and words in line for line in lines), lines


def test_without_a_length_the_rest_of_the_file_is_the_weight(tmp_path):
    path = _external(tmp_path)
    model = onnx.load(path, load_external_data=False)

    def start(tensor: TensorProto) -> int:
        return int({entry.key: entry.value for entry in tensor.external_data}.get("offset", 0))

    first, *_, last = sorted((w for w in model.graph.initializer if w.external_data), key=start)
    for tensor, sound in ((last, True), (first, False)):
        length = next(entry for entry in tensor.external_data if entry.key == "length")
        tensor.external_data.remove(length)
        path.write_bytes(model.SerializeToString())
        assert (check(path, NEW) == []) is sound


def test_a_link_out_of_the_folder_is_found(tmp_path):
    folder = tmp_path / "graph"
    folder.mkdir()
    path = _external(folder)
    data = folder / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    found = [f for f in check(path, NEW) if f.rule == "data"]
    assert found
    assert all("a link to" in finding.message for finding in found)


@pytest.mark.parametrize("name", ["w_q", "heads", "norm"])
def test_short_numbers_in_the_graph_are_found(tmp_path, name):
    model = graph()
    tensor = next(weight for weight in model.graph.initializer if weight.name == name)
    if tensor.HasField("raw_data"):
        tensor.raw_data = tensor.raw_data[:-1]
    else:
        del tensor.int32_data[-1:]
    lines = found(model, tmp_path)
    assert any(line.startswith((f"data: {name}: ", "file: ")) for line in lines), lines


def test_a_file_beyond_protobufs_limit_is_found(tmp_path):
    path = tmp_path / "model.onnx"
    with path.open("wb") as stream:
        stream.truncate(2**31)
    assert [f.rule for f in check(path, NEW)] == ["size"]


@pytest.mark.parametrize("content", [b"", b"not a graph", graph().SerializeToString()[:-40]])
def test_what_is_no_graph_is_found(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert check(path, NEW)
    assert [f.rule for f in check(tmp_path / "none.onnx", NEW)] == ["file"]


# --- the facts --------------------------------------------------------------------------------


def test_the_facts_do_not_contradict_each_other():
    data = json.loads(trt_support.DATA.read_text())
    operators = set(data["operators"])
    # What came with a later version than the matrix may be listed as absent there.
    assert not operators & set(data["unsupported"])
    standard = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    assert operators - standard <= {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "Scatter",
                                    "Upsample"}  # fmt: skip
    assert {t for types in data["operators"].values() for t in types.split()} <= set(
        trt_support.TYPES.values()
    )
    assert set(data["since"]) <= set(data["versions"])
    assert data["sources"]


@pytest.mark.parametrize(
    ("version", "read_as"),
    [("11.4.0.106", "11.4"), ("10.15.1.29", "10.15"), ("12.1", "11.5"), ("10.99", "10.16")],
)
def test_a_version_is_read_as_the_newest_that_is_known_and_not_newer(version, read_as):
    assert support(version).version == read_as


@pytest.mark.parametrize(("version", "words"), [("9.3", "too old"), ("new", "not a version")])
def test_an_unknown_version_is_refused(version, words):
    with pytest.raises(EngineError, match=words):
        support(version)


# --- the command ------------------------------------------------------------------------------


def test_the_command_checks_a_file(tmp_path, capsys):
    model = graph()
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["--check", str(tmp_path / "model.onnx")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"][0] == OLDEST
    assert result["graphs"]["model.onnx"]["11.4"] == []
    assert main(["--check", str(tmp_path / "model.onnx"), "--tensorrt", "10.14"]) == 1
    _output_name(model)
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["--check", str(tmp_path / "model.onnx")]) == 1


def test_a_file_is_checked_as_what_it_is_said_to_be(tmp_path, exported: Bundle):
    onnx.save(graph(), tmp_path / "model.onnx")
    file = ["--check", str(tmp_path / "model.onnx")]
    assert main([*file, "--precision", "int8"]) == 0
    assert main([*file, "--precision", "fp8"]) == 1
    assert main([*file, "--parts", "transformer"]) == 1
    for wrong in (["--precision", "int9"], ["--precision", "int8,fp8"], ["--parts", "unet"]):
        assert main([*file, *wrong]) == 2
    whole = exported.file(exported.parts["transformer"].files["fp32"].path)
    assert main(["--check", str(whole), "--parts", "transformer"]) == 0


def test_the_command_checks_a_bundle(exported: Bundle, capsys):
    assert main(["--check", str(exported.path), "--static", "64x64"]) == 0
    graphs = json.loads(capsys.readouterr().out)["graphs"]
    assert "transformer int8 64x64x1" in graphs
    assert main(["--check", str(exported.path), "--parts", "unet"]) == 2
    for wrong in (
        [str(exported.path / "none")],
        [str(exported.path), "--precision", "int9"],
        [str(exported.path), "--precision", "int8,int9"],
        [str(exported.path), "--precision", "int8", "--parts", "text_encoder"],
    ):
        capsys.readouterr()
        assert main(["--check", *wrong]) == 2
        assert capsys.readouterr().out == ""


def test_a_graph_of_another_size_than_the_limits_is_found(exported: Bundle):
    """A batch beyond what the bundle's graph has free is found through its own profile."""
    path = exported.file(exported.parts["classifier"].files["fp32"].path)
    shapes = dict(profile(exported, "classifier"))
    large = shapes["pixel_values"]
    shapes["pixel_values"] = replace(large, max=(*large.max[:2], 4096, 4096))
    assert any("is fixed to" in f.message for f in check(path, NEW, shapes))
