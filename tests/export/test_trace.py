"""What tracing restates is equal to diffusers', and where the weights go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from dermaflux import flow
from dermaflux.checkpoint import Checkpoint
from dermaflux.engines import eager
from dermaflux.engines.ort import OrtEngine
from dermaflux.engines.ov import OpenVinoEngine
from export.quantize import quantize
from export.shapes import Size, examples
from export.trace import RotaryAngles, RotaryAttention, trace


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
    together, apart = tmp_path / "together/model.onnx", tmp_path / "apart/model.onnx"
    for graph, limit in ((together, 10**9), (apart, 1000)):
        graph.parent.mkdir()
        trace(eager.module(tiny_checkpoint, "classifier"), inputs, graph, inline_bytes=limit)
    assert [path.name for path in together.parent.iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in apart.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    assert apart.stat().st_size < together.stat().st_size / 2
    expected = OrtEngine(together, "fp32").run(inputs)
    for engine in (OrtEngine, OpenVinoEngine):
        found = engine(apart, "fp32").run(inputs)
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-6)

    assert quantize(apart, apart.with_name("model_int8.onnx"), [inputs]) == 4
    assert (apart.parent / "model_int8.onnx.data").is_file()
    found = OpenVinoEngine(apart.with_name("model_int8.onnx"), "int8").run(inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=0.1)
    for weight in onnx.load(apart, load_external_data=False).graph.initializer:
        assert all(
            e.value == "model.onnx.data" for e in weight.external_data if e.key == "location"
        )
