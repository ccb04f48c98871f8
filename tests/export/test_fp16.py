"""What fp16 needs on hardware that computes in it: clipped sums, and steps that are not nought.

ONNX Runtime and OpenVINO compute fp16 in fp32 on a CPU and hide both, so the graphs are run by
onnx's own evaluator, which rounds after every operator.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager
from dermaflux.engines.ort import OrtEngine
from export.lower import lower
from export.quantized import attentions, layers, quantized
from export.recipes import RECIPES
from export.shapes import Size, examples
from export.trace import trace, write


class LayerNormalization(OpRun):
    """As its operator says: mean and variance in float32 (`stash_type` 1), which onnx's evaluator
    leaves out."""

    def _run(self, x, weight=None, bias=None, axis=None, epsilon=None, stash_type=None):
        assert stash_type == 1
        assert axis == -1
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        normed = normed.astype(x.dtype)
        normed = normed if weight is None else normed * weight
        return (normed if bias is None else normed + bias,)


@pytest.fixture(scope="module")
def traced(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    given = examples(checkpoint, "transformer", Size(2, 32, 48))
    return trace(tiny_checkpoint, "transformer", given)


@pytest.mark.parametrize(
    "layer",
    ["transformer_blocks.0.ff_context.net.2", "single_transformer_blocks.0.proj_out"],
)
def test_a_stream_that_passes_the_largest_number_stays_a_number(
    traced, tiny_checkpoint, tmp_path, layer
):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    given = examples(checkpoint, "transformer", Size(1, 32, 32))
    module = eager.load(tiny_checkpoint, "transformer").model
    module.model.get_submodule(layer).weight.data *= 5e5
    expected = module.half()(
        *(
            value.half() if value.is_floating_point() else value
            for value in map(_tensor, (given[name] for name in module.inputs))
        )
    )[0]
    assert expected.isfinite().all()  # diffusers clips

    model = traced.clone()
    weight = next(x.weight for x in layers(model) if x.name == layer)
    grown = (weight.const_value.numpy() * np.float32(5e5)).astype(np.float32)
    weight.const_value = onnx_ir.Tensor(grown, name=weight.name)
    write(lower(model, RECIPES["fp16"]["transformer"]), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    (found,) = ReferenceEvaluator(graph, new_ops=[LayerNormalization]).run(None, dict(given))
    assert np.isfinite(found).all()
    largest = float(expected.abs().max())
    assert np.abs(found - expected.float().numpy()).max() < 0.1 * largest


def _tensor(value):
    import torch

    return torch.from_numpy(value)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_channels_and_inputs_of_nearly_nought(traced, tiny_checkpoint, tmp_path, precision):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    given = examples(checkpoint, "transformer", Size(1, 32, 32))
    model = traced.clone()
    by_name = {layer.name: layer for layer in layers(model)}
    seen = {name: np.full(layer.width, 4, np.float32) for name, layer in by_name.items()}
    seen |= {name: np.ones(1, np.float32) for _, _, name in attentions(model)}
    for name, factor in (("attn.to_q", 0), ("attn.to_k", 1e-6)):
        weight = by_name[f"transformer_blocks.0.{name}"].weight
        numbers = weight.const_value.numpy().copy()
        numbers[:, 3] *= factor
        weight.const_value = onnx_ir.Tensor(numbers, name=weight.name)
    # A layer whose inputs were never anything.
    seen["transformer_blocks.0.ff.net.2"] = np.zeros_like(seen["transformer_blocks.0.ff.net.2"])
    recipe = RECIPES[precision]["transformer"]
    quantized(lower(model, recipe), recipe, seen)
    write(model, tmp_path / "model.onnx")
    scales = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()
              if str(v.name).endswith("_scale")}  # fmt: skip
    assert len(scales) > 20
    for name, scale in scales.items():
        assert scale.dtype == np.float16
        assert (scale > 0).all(), name
        assert np.isfinite(scale).all(), name
    outputs = OrtEngine(tmp_path / "model.onnx", precision).run(given)
    assert np.isfinite(outputs["out_hidden_states"]).all()


def test_weights_are_divided_by_the_step_that_multiplies_them(traced):
    """The step is rounded to fp16 first: no weight is further off than half of one step."""
    model = traced.clone()
    recipe = RECIPES["int8"]["transformer"]
    before = {layer.name: layer.weight.const_value.numpy() for layer in layers(model)}
    seen = {layer.name: np.full(layer.width, 4, np.float32) for layer in layers(model)}
    name = "transformer_blocks.0.norm1.linear"  # weights only, so nothing is smoothed
    quantized(lower(model, recipe), recipe, seen)
    values = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    step = values[f"{name}.weight_scale"].astype(np.float64)
    shape = (-1, 1) if values[f"{name}.weight_in8"].shape[0] == step.size else (1, -1)
    error = np.abs(values[f"{name}.weight_in8"] * step.reshape(shape) - before[name])
    assert (error <= 0.5 * step.reshape(shape) + 5e-4 * np.abs(before[name])).all()
