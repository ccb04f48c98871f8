"""int8 is symmetric, per channel, standard, where it was wanted, repeatable, and active."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from dermaflux.checkpoint import Checkpoint
from dermaflux.errors import EngineError
from export.quantize import quantize
from export.reference import requests
from export.shapes import Size, examples
from export.verify import Graph, operations, require_active

# A block with two streams has 6 projections of tokens to attention, 2 back and 4 of its MLPs; a
# block with one stream has 3, its MLP and the way back. The tiny transformer has 1 and 2 of them.
PRODUCTS = {"transformer": 12 + 2 * 5, "classifier": 4}


@pytest.fixture(scope="module")
def int8(exported):
    return onnx.load(exported.file(exported.parts["transformer"].files["int8"].path))


@pytest.mark.parametrize("part", PRODUCTS)
def test_what_was_quantized_runs_in_int8(exported, part):
    found = exported.parts[part].files["int8"].quantized_ops
    assert found["FullyConnected"]["i8"] == PRODUCTS[part]
    graph = exported.file(exported.parts[part].files["fp32"].path)
    assert set(operations(graph)["FullyConnected"]) == {"f32"}


def test_int8_that_is_not_active_is_refused(exported):
    file = exported.parts["transformer"].files["int8"]
    fp32 = {"FullyConnected": {"f32": 36}}
    graph = Graph(exported.file(file.path), "transformer", "int8", (), fp32, file.parity, rows=())
    with pytest.raises(EngineError, match=r"of 22 .* OpenVINO runs 0 in int8 .*--precision fp32"):
        require_active(graph, 22)
    require_active(replace(graph, operations={"FullyConnected": {"i8": 22, "f32": 14}}), 22)


def test_it_is_symmetric_and_per_channel(int8):
    weights = {w.name: numpy_helper.to_array(w) for w in int8.graph.initializer}
    made_by = {name: node for node in int8.graph.node for name in node.output}
    products = 0
    for node in int8.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not weights[node.input[2]].any()
            assert weights[node.input[2]].dtype == np.int8
        if node.op_type == "MatMul" and made_by.get(node.input[1]):
            dequantize = made_by[node.input[1]]
            values, scales = (weights[name] for name in dequantize.input[:2])
            assert values.dtype == np.int8
            assert scales.shape == values.shape[1:]
            # All of the range is used, and none of it is -128, which has no opposite.
            assert np.abs(values.astype(int)).max() == 127
            assert weights[made_by[node.input[0]].input[1]].shape == ()
            products += 1
    assert products == PRODUCTS["transformer"]


def test_modulations_and_both_ends_stay_in_fp32(int8):
    kinds = {w.name: w.data_type for w in int8.graph.initializer}
    for layer in (
        "x_embedder",
        "context_embedder",
        "proj_out",
        "norm_out.linear",
        "transformer_blocks.0.norm1.linear",
        "time_text_embed.timestep_embedder.linear_1",
    ):
        assert kinds[f"{layer}.weight"] == TensorProto.FLOAT
    assert Counter(kinds.values())[TensorProto.INT8] >= PRODUCTS["transformer"]


def test_equal_samples_equal_bytes(exported, tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    graph = exported.file(exported.parts["transformer"].files["fp32"].path)
    samples = [examples(checkpoint, "transformer", Size(2, 32, 32), seed) for seed in range(2)]
    for name in ("one.onnx", "two.onnx"):
        quantize(graph, tmp_path / name, samples)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


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
