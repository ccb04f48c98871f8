"""Floating-point operations of a model's parts, 2 a multiply-add: what floors are made of.

From a part's graph, whatever its architecture; and from configs of FLUX.1's parts, where there is
no graph. Counted are products (linear layers, convolutions, attention); norms, activations and
sums are not: they are bound by memory and hide behind products.

    >>> graph(bundle.file("transformer/model.onnx"), shapes)
    Work(linear=1203765248, attention=117964800)
    >>> transformer_flops(config, image_tokens=4096, text_tokens=512)
    74384834985984
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux.bundle import Bundle, Part
from dermaflux.engines.sizes import shape_of, sizes
from dermaflux.errors import EngineError, translated

_PRODUCTS: Final = ("MatMul", "Convolution", "GroupConvolution", "ScaledDotProductAttention")


@dataclass(frozen=True)
class Work:
    """Operations of products with weights, and of products of two activations: quantization covers
    the first alone."""

    linear: int
    attention: int

    @property
    def flops(self) -> int:
        return self.linear + self.attention


def of_part(bundle: Bundle, name: str, batch: int, height: int, width: int) -> Work | None:
    """One call of a part for `batch` images of a size in pixels; None without OpenVINO, which
    reads the graph.

    Counted in the fp32 file where there is one: what is quantized does the same work.

    Raises:
        EngineError: OpenVINO cannot read the file.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    part = bundle.parts[name]
    file = part.files.get("fp32") or next(iter(part.files.values()))
    return graph(bundle.file(file.path), _shapes(part, bundle.model.scale, batch, height, width))


def weights(bundle: Bundle, name: str, precision: str) -> int:
    """Bytes that a call of a part has to read at least once: those of its file."""
    file = bundle.parts[name].files[precision]
    return file.bytes + sum(data.bytes for data in file.data)


def graph(path: Path, shapes: Mapping[str, Sequence[int]]) -> Work:
    """The work of a graph for inputs of these shapes, each by name.

    Raises:
        EngineError: OpenVINO cannot read the file, or it does not take these shapes.
    """
    from dermaflux.engines.ov import core

    with translated(EngineError, f"OpenVINO cannot count the work of {path}"):
        model = core().read_model(str(path))
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        linear = attention = 0
        # Weights may be transposed or unpacked first: whatever comes from constants alone is one.
        constant: dict[str, bool] = {}
        for node in model.get_ordered_ops():
            given = [constant[node.input_value(index).get_node().get_name()]
                     for index in range(node.get_input_size())]  # fmt: skip
            kind = node.get_type_name()
            constant[node.get_name()] = kind == "Constant" or (bool(given) and all(given))
            if kind == "ScaledDotProductAttention" or (kind == "MatMul" and not any(given)):
                attention += _products(node, kind)
            else:
                linear += _products(node, kind)
    return Work(linear, attention)


def transformer_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> int:
    """One forward of one item. `config` is diffusers' FluxTransformer2DModel's.

    A block's linears are 12 d^2 per token (3 QKV, 1 output, 8 MLP), its modulation 6 d^2 (double,
    per stream) or 3 d^2 (single) per item.
    """
    d = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = image_tokens + text_tokens
    layers = config["num_layers"] + config["num_single_layers"]
    linear = layers * 12 * d * d * tokens
    modulation = (config["num_layers"] * 12 + config["num_single_layers"] * 3 + 2) * d * d
    edges = (
        2 * config["in_channels"] * image_tokens + config["joint_attention_dim"] * text_tokens
    ) * d
    attention = layers * 2 * tokens * tokens * d
    return int(2 * (linear + modulation + edges + attention))


def decoder_flops(config: Mapping[str, Any], height: int, width: int) -> int:
    """One image of `height` x `width` pixels. `config` is diffusers' AutoencoderKL's.

    Source: `diffusers.models.autoencoders.vae.Decoder`: a middle of two residual blocks around an
    attention, then per level `layers_per_block` + 1 residual blocks, each of two convolutions and,
    where channels change, one of 1 x 1; between levels the image doubles before a convolution.
    """
    channels = list(config["block_out_channels"])[::-1]
    shrunk = 2 ** (len(channels) - 1)
    cells = (height // shrunk) * (width // shrunk)
    latent, wide = config["latent_channels"], channels[0]
    post = latent * latent if config.get("use_post_quant_conv", True) else 0
    total = cells * (post + 9 * latent * wide + 2 * _residual(wide, wide))
    if config.get("mid_block_add_attention", True):
        total += cells * 4 * wide * wide + 2 * cells * cells * wide
    before = wide
    for level, after in enumerate(channels):
        total += cells * _residual(before, after)
        total += cells * config["layers_per_block"] * _residual(after, after)
        if level + 1 < len(channels):
            cells *= 4
            total += cells * 9 * after * after
        before = after
    return int(2 * (total + cells * 9 * before * config["out_channels"]))


def _residual(before: int, after: int) -> int:
    """Multiply-adds a pixel of a residual block."""
    return 9 * after * (before + after) + (before * after if before != after else 0)


def _shapes(
    part: Part, scale: int, batch: int, height: int, width: int
) -> dict[str, tuple[int, ...]]:
    free = sizes(scale, batch, height, width)
    return {tensor.name: tuple(shape_of(tensor, free)) for tensor in part.inputs}


def _products(node: Any, kind: str) -> int:
    """Operations of one node, 0 of all but products."""
    if kind not in _PRODUCTS:
        return 0
    out = list(node.output(0).get_shape())
    if kind == "MatMul":
        inner = list(node.input(0).get_shape())[-2 if node.get_attributes()["transpose_a"] else -1]
        return int(2 * math.prod(out) * inner)
    if kind in ("Convolution", "GroupConvolution"):
        # Weights are [out, in, ...], or [groups, out, in, ...]: a value takes in * kernel of them.
        skip = 1 if kind == "Convolution" else 2
        return int(2 * math.prod(out) * math.prod(list(node.input(1).get_shape())[skip:]))
    *_, rows, width = node.input(0).get_shape()
    columns = list(node.input(1).get_shape())[-2]
    return int(2 * math.prod(out[:-2]) * rows * columns * (width + out[-1]))
