"""What tracing restates is equal to diffusers', and where the weights go."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from safetensors.torch import load_file, save_file

from dermaflux import flow
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines.ort import OrtEngine
from dermaflux.engines.ov import OpenVinoEngine
from dermaflux.errors import BundleError
from export.quantized import layers, quantized
from export.recipes import RECIPES
from export.shapes import Size, examples
from export.trace import RotaryAngles, RotaryAttention, size, trace, write
from export.weights import cast, stored, transposed


def test_angles_are_those_of_diffusers():
    axes = (16, 56, 56)
    ids = torch.from_numpy(np.concatenate([flow.text_ids(512), flow.image_ids(128, 128)]))
    cos, sin = RotaryAngles(10000, axes)(ids)
    expected_cos, expected_sin = FluxPosEmbed(10000, list(axes))(ids)
    # diffusers repeats every angle for both members of a pair.
    assert (cos - expected_cos[:, ::2]).abs().max() < 8e-6
    assert (sin - expected_sin[:, ::2]).abs().max() < 8e-6


@pytest.mark.parametrize("head", [16, 64])
def test_rotary_attention_is_that_of_diffusers(head):
    torch.manual_seed(0)
    axes = (head // 4, head // 8 * 3, head // 8 * 3)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=head,
        num_attention_heads=3,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=axes,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 24, 8),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.9, 0.2]),
        "img_ids": torch.from_numpy(flow.image_ids(8, 12)),
        "txt_ids": torch.from_numpy(flow.text_ids(7)),
    }
    with torch.inference_mode():
        (expected,) = model(**inputs, return_dict=False)
        model.pos_embed = RotaryAngles(10000, axes)
        model.set_attn_processor(RotaryAttention())
        (found,) = model(**inputs, return_dict=False)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_weights_too_many_for_one_file_go_beside_it(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    inputs = examples(checkpoint, "classifier", Size(2, 32, 32))
    model = trace(tiny_checkpoint, "classifier", inputs)
    together, apart = tmp_path / "together/model.onnx", tmp_path / "apart/model.onnx"
    for graph, limit in ((together, 10**9), (apart, 1000)):
        graph.parent.mkdir()
        write(model, graph, inline_bytes=limit, small=256)
    assert [path.name for path in together.parent.iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in apart.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    assert size(apart) < 1.2 * size(together)
    assert apart.stat().st_size < together.stat().st_size / 2
    expected = OrtEngine(together, "fp32").run(inputs)
    for engine in (OrtEngine, OpenVinoEngine):
        found = engine(apart, "fp32").run(inputs)
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-6)

    seen = {layer.name: np.full(layer.width, 4, np.float32) for layer in layers(model)}
    assert quantized(model, RECIPES["int8"]["classifier"], seen) == 5
    write(model, apart.with_name("model_int8.onnx"), inline_bytes=1000, small=256)
    assert (apart.parent / "model_int8.onnx.data").is_file()
    found = OpenVinoEngine(apart.with_name("model_int8.onnx"), "int8").run(inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=0.1)
    for weight in onnx.load(apart, load_external_data=False).graph.initializer:
        assert all(
            e.value == "model.onnx.data" for e in weight.external_data if e.key == "location"
        )


def test_weights_that_do_not_fit_are_named(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = checkpoint / "classifier/model.safetensors"
    weights = load_file(file)
    inputs = examples(Checkpoint.open(checkpoint), "classifier", Size(2, 32, 32))
    lacking = {name: tensor for name, tensor in weights.items() if name != "head.bias"}
    for content, sentence in (
        (lacking, "lack head.bias"),
        ({**weights, "head.bias": torch.zeros(3)}, r"have \[3\] as head.bias, which needs \[2\]"),
    ):
        save_file(content, file)
        with pytest.raises(BundleError, match=sentence):
            trace(checkpoint, "classifier", inputs)


def test_shards_in_bf16_are_read_in_any_type(tmp_path):
    numbers = torch.randn(5, 3).to(torch.bfloat16)
    save_file({"a": numbers, "b": torch.arange(4)}, tmp_path / "one.safetensors")
    found = stored(tmp_path)
    assert found["a"].dtype == onnx_ir.DataType.BFLOAT16
    wide = cast(transposed(found["a"]), onnx_ir.DataType.FLOAT)
    assert tuple(wide.shape) == (3, 5)
    assert np.array_equal(wide.numpy(), numbers.float().numpy().T)
    assert found["b"].numpy().tolist() == [0, 1, 2, 3]
