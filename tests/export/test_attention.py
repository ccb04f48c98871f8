"""A vision transformer's attention said apart is the same attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dermaflux.checkpoint import Checkpoint
from export import attention, shapes
from export.lower import lower
from export.recipes import RECIPES
from export.trace import trace, write
from export.verify import open_graph, standard

RECIPE = RECIPES["int8"]["classifier"]


@pytest.fixture(scope="module")
def traced(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    inputs = shapes.examples(checkpoint, "classifier", shapes.sizes(checkpoint)[1])
    return trace(tiny_checkpoint, "classifier", inputs), inputs


def run(model, inputs, file, engine="openvino-cpu"):
    write(model, file)
    standard(file)
    return open_graph(engine, file, "fp32").run(inputs)


@pytest.mark.parametrize("engine", ["openvino-cpu", "onnxruntime-cpu"])
def test_apart_as_together(traced, tmp_path, engine):
    model, inputs = traced
    expected = run(model, inputs, tmp_path / "together.onnx", engine)
    parted = model.clone()
    assert attention.split(parted) == ("blocks.0.attn.qkv",)
    found = run(parted, inputs, tmp_path / "apart.onnx", engine)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 1e-5 * np.abs(value).max()
    kinds = Counter(node.op_type for node in parted.graph)
    before = Counter(node.op_type for node in model.graph)
    assert kinds["Attention"] == before["Attention"] - 1 == 0
    assert "blocks.0.attn.qkv.weight" not in parted.graph.initializers
    assert {f"blocks.0.attn.qkv.{x}" for x in ("query", "key", "value")} <= {
        node.name for node in parted.graph
    }


def test_factors_are_in_8_bits_where_their_ranges_are_known(traced, tmp_path):
    model, inputs = traced
    parted = lower(model.clone(), replace(RECIPE, rest="float32"))
    names = attention.split(parted)
    seen = attention.known(names, {names[0]: np.ones(32, np.float32)})
    assert attention.in8(parted.clone(), names, "int8", seen) == 0
    ranges = {f"blocks.0.attn.{x}": np.array([1.5], np.float32) for x in ("query", "key", "value")}
    plain = run(parted.clone(), inputs, tmp_path / "plain.onnx")["logits"]
    assert attention.in8(parted, names, "int8", {**seen, **ranges}) == 3
    nodes = {node.name: node for node in parted.graph}
    taken = {
        what: [value.producer().op_type for value in nodes[f"blocks.0.attn.{what}.MatMul"].inputs]
        for what in ("scores", "mixed")
    }
    assert taken["scores"] == ["DequantizeLinear"] * 2
    assert taken["mixed"] == ["DequantizeLinear"] * 2
    assert set(seen) == {names[0], *(f"{names[0]}.{x}" for x in ("query", "key", "value"))}
    found = run(parted, inputs, tmp_path / "in8.onnx")["logits"]
    assert 0 < np.abs(found - plain).max() < 0.1 * np.abs(plain).max()


def test_what_is_no_vision_transformer_is_left_alone(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    inputs = shapes.examples(checkpoint, "transformer", shapes.sizes(checkpoint)[1])
    model = trace(tiny_checkpoint, "transformer", inputs)
    count = len(list(model.graph))
    assert attention.split(model) == ()
    assert len(list(model.graph)) == count


def test_weights_of_more_tokens_than_an_even_row_has_steps_for_stay_high(traced, monkeypatch):
    model, _ = traced
    tokens = next(n for n in model.graph if n.op_type == "Attention").outputs[0].shape[2]
    ranges = {f"blocks.0.attn.{x}": np.ones(1, np.float32) for x in ("query", "key", "value")}
    for most, count in ((tokens, 3), (tokens - 1, 2)):
        monkeypatch.setattr(attention, "_MOST_TOKENS", most)
        parted = model.clone()
        assert attention.in8(parted, attention.split(parted), "int8", ranges) == count
        (mixed,) = (node for node in parted.graph if node.name == "blocks.0.attn.mixed.MatMul")
        kinds = [value.producer().op_type == "DequantizeLinear" for value in mixed.inputs]
        assert kinds == [count == 3] * 2
