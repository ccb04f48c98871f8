"""8 bits are symmetric, standard, where the recipe wants them, repeatable, and active."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import OPENVINO, ORT
from dermaflux.errors import EngineError
from export.quantized import LARGEST, attentions, layers, missing, quantized
from export.recipes import RECIPES, Recipe
from export.reference import requests
from export.trace import write
from export.verify import Graph, operations, require_active

# A block with two streams has 6 projections of tokens to attention, 2 back and 4 of its MLPs; a
# block with one stream has 3, its MLP and the way back. The tiny transformer has 1 and 2 of them.
PRODUCTS = {"transformer": 12 + 2 * 5, "classifier": 4}
APART = {"transformer": 0, "classifier": 2}
"""In int8 queries, keys and values are three products of one."""
# One for each stream of a block, and the last norm's.
MODULATIONS = 2 + 2 + 1
EIGHT = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def _graph(exported, part, precision):
    return onnx.load(exported.file(exported.parts[part].files[precision].path))


@pytest.mark.parametrize("part", PRODUCTS)
def test_what_was_quantized_runs_in_int8(exported, part):
    found = exported.parts[part].files["int8"].quantized_ops[OPENVINO]["FullyConnected"]
    assert found["i8"] == PRODUCTS[part] + APART[part]
    # Where weights alone are in 8 bits, that is not called a product in 8 bits.
    weights = MODULATIONS if part == "transformer" else 0
    assert found.get("f32 of 8-bit weights", 0) == weights
    graph = exported.file(exported.parts[part].files["fp32"].path)
    assert set(operations(graph, (OPENVINO,))[OPENVINO]["FullyConnected"]) == {"f32"}


@pytest.mark.parametrize("part", PRODUCTS)
def test_fp8_is_emulated_and_the_bundle_says_so(exported, part):
    file = exported.parts[part].files["fp8"]
    assert file.emulated == (ORT,)
    counts = Counter()
    for found in file.quantized_ops[ORT].values():
        counts.update(found)
    assert counts["f32 of 8 bits"] == PRODUCTS[part]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_is_not_active_is_refused(exported, precision):
    file = exported.parts["transformer"].files[precision]
    fp32 = {OPENVINO: {"FullyConnected": {"f32": 36}}}
    graph = Graph(exported.file(file.path), "transformer", precision, (), fp32, file.parity)
    with pytest.raises(EngineError, match=rf"{precision} is not active: of 22 .* runs 0 in 8 bits"):
        require_active(graph, 22)
    active = {OPENVINO: {"FullyConnected": {"i8": 22, "f32": 14}}}
    require_active(replace(graph, operations=active), 22)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_it_is_symmetric_and_scaled_as_the_runtimes_take_it(exported, precision):
    model = _graph(exported, "transformer", precision)
    weights = {w.name: w for w in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = weights[node.input[2]]
            assert zero.data_type == EIGHT[precision]
            assert not numpy_helper.to_array(zero).astype(np.float32).any()
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in made_by:
            continue
        way_back = made_by[node.input[1]]
        values, scales = (numpy_helper.to_array(weights[name]) for name in way_back.input[:2])
        per_channel = (values.shape[-1 if node.op_type == "MatMul" else 0],)
        assert scales.shape == (per_channel if precision == "int8" else ())
        # All of the range is used, and of int8's not -128, which has no opposite.
        kind = RECIPES[precision]["transformer"].kind
        assert np.abs(values.astype(np.float32)).max() == LARGEST[kind]
        fed = made_by.get(node.input[0])
        full = fed is not None and fed.op_type == "DequantizeLinear"
        counts["both" if full else "weights"] += 1
        if full:
            assert numpy_helper.to_array(weights[fed.input[1]]).shape == ()
    assert counts == {"both": PRODUCTS["transformer"], "weights": MODULATIONS}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_both_ends_stay_high_and_modulations_do_not(exported, precision):
    kinds = {
        w.name: w.data_type for w in _graph(exported, "transformer", precision).graph.initializer
    }
    for layer in (
        "x_embedder",
        "context_embedder",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
    ):
        assert kinds[f"{layer}.weight"] == TensorProto.FLOAT16
    for layer in ("norm_out.linear", "transformer_blocks.0.norm1.linear"):
        assert f"{layer}.weight" not in kinds
        assert kinds[f"{layer}.weight_in8"] == EIGHT[precision]


def test_numbers_are_the_nearest(fp32):
    model, seen = fp32
    before = {layer.name: layer.weight.const_value.numpy() for layer in layers(model)}
    quantized(model, replace(RECIPES["int8"]["transformer"], smooth=None), seen)
    values = {v.name: v.const_value for v in model.graph.initializers.values()}
    name = "single_transformer_blocks.1.proj_mlp"
    numbers, scales = (values[f"{name}.weight{end}"].numpy() for end in ("_in8", "_scale"))
    assert np.abs(numbers * scales - before[name]).max() <= scales.max() / 2 * 1.0001


def test_smoothquant_leaves_the_product_as_it_is(fp32, tmp_path):
    model, seen = fp32
    plain = Recipe(kind="int8", layers=("single_transformer_blocks.0.*",), per_channel=True)
    wide = {name: channels.copy() for name, channels in seen.items()}
    wide["single_transformer_blocks.0.proj_mlp"][3] = 1000
    for name in ("to_q", "to_k", "to_v"):
        wide[f"single_transformer_blocks.0.attn.{name}"][3] = 1000
    smooth = model.clone()
    quantized(smooth, replace(plain, smooth=0.5, weights_only=("*.norm.linear",)), wide)
    values = {v.name: v.const_value for v in smooth.graph.initializers.values()}
    # The first of the layers that share the input gives its name to what they share.
    first, stem = (f"single_transformer_blocks.0.{end}" for end in ("proj_mlp", "attn.to_q"))
    divisor = 1 / values[f"{first}.smooth"].numpy()
    assert divisor.argmax() == 3
    # What was divided out of the input is in the weights: of one input all layers get the same.
    made = [node for node in smooth.graph if node.op_type == "Mul" and "smooth" in str(node.name)]
    sharing = {str(use.node.name) for use in made[0].outputs[0].uses()}
    assert sharing == {f"{first}.in8.QuantizeLinear"}
    weight = values[f"{stem}.weight_in8"].numpy() * values[f"{stem}.weight_scale"].numpy()
    original = next(x for x in layers(model) if x.name == stem).weight.const_value.numpy()
    np.testing.assert_allclose(
        weight, original * divisor[:, None], atol=values[f"{stem}.weight_scale"].numpy().max()
    )


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_attention_in_8_bits_where_it_is_asked_for(fp32, tmp_path, precision):
    model, seen = fp32
    recipe = replace(RECIPES[precision]["transformer"], attention=True)
    names = [name for _, _, name in attentions(model)]
    assert len(names) == 3 * 3
    with pytest.raises(EngineError, match=rf"lacks 1 layers, {names[4]} first"):
        quantized(model.clone(), recipe, {k: v for k, v in seen.items() if k != names[4]})
    plain, more = model.clone(), model.clone()
    assert quantized(plain, replace(recipe, attention=False), seen) == quantized(more, recipe, seen)
    for graph, factors in ((plain, 0), (more, 3)):
        fed = [
            [value.producer().op_type for value in node.inputs[:3]].count("DequantizeLinear")
            for node in graph.graph
            if node.op_type == "Attention"
        ]
        assert fed == [factors] * 3
    write(more, tmp_path / "model.onnx")
    scales = {v.name: v.const_value for v in more.graph.initializers.values()}
    for name in names:
        most = float(scales[f"{name}.input_scale"].numpy()) * LARGEST[recipe.kind]
        assert most == pytest.approx(float(seen[name][0]), rel=1e-3)


def test_a_table_of_another_model_is_refused(fp32):
    model, seen = fp32
    recipe = RECIPES["fp8"]["transformer"]
    name = "transformer_blocks.0.attn.to_q"
    assert not missing(model, recipe, seen)
    for wrong in ({k: v for k, v in seen.items() if k != name}, {**seen, name: np.ones(3)}):
        assert missing(model, recipe, wrong) == [name]
        with pytest.raises(EngineError, match=rf"lacks 1 layers, {name} first.*--calibrate"):
            quantized(model.clone(), recipe, wrong)


def test_equal_tables_equal_bytes(fp32, tmp_path):
    model, seen = fp32
    for name in ("one.onnx", "two.onnx"):
        copy = model.clone()
        quantized(copy, RECIPES["fp8"]["transformer"], seen)
        onnx_ir.save(copy, tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.fixture
def fp32(exported):
    """The tiny transformer's graph, and a table that says 4 of everything."""
    model = onnx_ir.load(exported.file(exported.parts["transformer"].files["fp32"].path))
    onnx_ir.passes.common.ShapeInferencePass()(model)
    widths = {layer.name: layer.width for layer in layers(model)}
    widths |= {name: 1 for _, _, name in attentions(model)}
    return model, {name: np.full(width, 4, np.float32) for name, width in widths.items()}


def test_requests_are_the_models_own_and_repeat(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    first = requests(checkpoint, 8, seed=0)
    assert first == requests(checkpoint, 8, seed=0)
    other = requests(checkpoint, 8, seed=1)
    assert not {r.seed for r in first} & {r.seed for r in other}
    assert not {r.prompt for r in first} & {r.prompt for r in other}
    assert {r.steps for r in first} == {checkpoint.defaults.steps}
    assert first[0].guidance == checkpoint.defaults.guidance
    assert {r.guidance for r in first} >= {1.0, 2 * checkpoint.defaults.guidance}


def test_numbers_are_those_of_onnx_runtimes_quantizer(tmp_path):
    """On a model that it can hold: the same integers, scales and error."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((8, 5), dtype=np.float32)
    samples = [{"x": random.standard_normal((3, 8), dtype=np.float32)} for _ in range(4)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "fp32.onnx")
    reader = SimpleNamespace(left=iter(samples))
    reader.get_next = lambda: next(reader.left, None)
    quantization.quantize_static(
        tmp_path / "fp32.onnx",
        tmp_path / "theirs.onnx",
        reader,
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    ours = onnx_ir.load(tmp_path / "fp32.onnx")
    largest = np.max([np.abs(sample["x"]).max(axis=0) for sample in samples], axis=0)
    assert quantized(ours, Recipe(kind="int8", per_channel=True), {"layer": largest}) == 1
    onnx_ir.save(ours, tmp_path / "ours.onnx")

    found = []
    for name in ("theirs", "ours"):
        loaded = onnx.load(tmp_path / f"{name}.onnx").graph
        kept = {w.name: numpy_helper.to_array(w) for w in loaded.initializer}
        makers = {output: node for node in loaded.node for output in node.output}
        (product,) = (node for node in loaded.node if node.op_type == "MatMul")
        fed, way_back = (makers[name] for name in product.input)
        found.append([kept[n] for n in (way_back.input[0], way_back.input[1], fed.input[1])])
    for theirs, mine in zip(*found, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
