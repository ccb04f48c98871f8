from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import flops, latency

FLUX_DEV = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "in_channels": 64,
    "joint_attention_dim": 4096,
}
FLUX_DECODER = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 16,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "use_post_quant_conv": False,
}


def test_flops_of_flux_dev_are_the_published_ones() -> None:
    # 59.512 TFLOP of linear layers (diffusers' own count: 59.523) and 14.872 of attention.
    found = latency.transformer_flops(FLUX_DEV, image_tokens=4096, text_tokens=512)
    assert found / 1e12 == pytest.approx(74.385, rel=2e-3)


def test_flops_of_a_decoder_are_those_of_its_modules() -> None:
    import torch
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    small = {**FLUX_DECODER, "block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
    model = AutoencoderKL(**small, **blocks, use_quant_conv=False).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.decode(torch.zeros(1, 16, 4, 6))
    # The counter leaves out attention as torch fuses it on a CPU: two products of 24 cells.
    attention = 2 * 2 * 24 * 24 * 24
    assert flops.decoder_flops(small, 32, 48) == counter.get_total_flops() + attention
    # 10.472 TFLOP at 1024 x 1024.
    assert flops.decoder_flops(FLUX_DECODER, 1024, 1024) / 1e12 == pytest.approx(10.472, rel=1e-4)


def test_a_graph_is_counted_product_by_product(tmp_path: Path) -> None:
    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.ones(shape, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "rows"], ["r"]),
        helper.make_node("Transpose", ["w"], ["turned"]),
        helper.make_node("MatMul", ["r", "turned"], ["q"]),
        helper.make_node("Transpose", ["r"], ["k"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["r", "k"], ["scores"]),
        helper.make_node("ReduceSum", ["q"], ["a"], keepdims=0),
        helper.make_node("ReduceSum", ["scores"], ["b"], keepdims=0),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "counted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [
            weights("kernel", 8, 3, 3, 3),
            weights("w", 5, 8),
            numpy_helper.from_array(np.array([0, -1, 8]), "rows"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    found = flops.graph(path, {"x": (2, 3, 4, 6)})
    tokens = 4 * 6
    convolution, linear = 2 * 2 * tokens * 8 * 27, 2 * 2 * tokens * 8 * 5
    assert found == flops.Work(convolution + linear, 2 * 2 * tokens * tokens * 8)
    assert found.flops == found.linear + found.attention
