"""A part of a checkpoint -> an ONNX graph of standard operators, without its weights in memory.

The part is built on torch's "meta" device, where a tensor has a shape and no numbers, and traced
there; the initializers of the graph are then tensors of the shards themselves, read one by one
when the graph is written (`export.weights`). So a model of 12 billion parameters is traced in the
memory of its graph, and written in that of its largest tensor. Small and large models, and all
precisions, take this road.

`torch.onnx.export(dynamo=True)` at opset 23, the first with RotaryEmbedding, Attention and
RMSNormalization, which engines have kernels for; opset 20 spells them out.

Two things of diffusers' transformer are said in other words before tracing, with equal results
(the tests compare): positions are computed in float32 instead of float64, which most engines do
not have, and rotation is the operator RotaryEmbedding instead of stacked slices, by halves of a
head instead of neighbouring channels (`export.rotary`).

The exporter's optimizer folds what is constant, and it would fold the transposed weights of the
linear layers in memory, and keep them; so they are transposed on the way from the shard instead,
and the optimizer sees none. What it leaves otherwise (sequences, CastLike, a Transpose of a
weight) has no place in the final graph, and `export.verify.standard` refuses it.

    >>> model = trace(Path("models/mini"), "transformer", inputs)
    >>> write(model, Path("model.onnx"))
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common
from torch import nn
from torch.nn import functional

from export.rotary import halves
from export.shapes import AXES, Arrays
from export.source import folder_of
from export.weights import cast, named, of_module, skeleton, transposed

OPSET: Final = 23
RESIDUAL: Final = "residual"
_FLUX_BLOCK: Final = re.compile(r"(single_)?transformer_blocks\.\d+")
INLINE_BYTES: Final = 128 * 2**20
"""Weights of more than this in all go to a file of their own beside the graph. A protobuf file
ends at 2 GiB, and is in memory several times over whenever it is written or opened."""
SMALL: Final = 2**16
"""Tensors of fewer bytes stay in the graph: scales, biases and shapes, which readers look at."""


class RotaryAngles(nn.Module):
    """Positions [S, axes] -> cosines and sines [S, head size / 2], in float32.

    Source: `diffusers.models.transformers.transformer_flux.FluxPosEmbed`, which computes angles in
    float64. Positions are small whole numbers and frequencies are rounded once, so an angle is
    off by at most 64 * 2**-24 = 4e-6 at 1024 pixels.
    """

    def __init__(self, theta: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes
        for axis, size in enumerate(axes):
            exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
            frequencies = (theta**-exponents).float()
            self.register_buffer(f"frequencies_{axis}", frequencies, persistent=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.cat(
            [
                ids[:, axis, None] * self.get_buffer(f"frequencies_{axis}")
                for axis in range(len(self.axes))
            ],
            dim=-1,
        )
        return angles.cos(), angles.sin()


class RotaryAttention:
    """An attention processor of Flux that rotates with the operator RotaryEmbedding.

    Source: `diffusers.models.transformers.transformer_flux.FluxAttnProcessor`.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        assert attention_mask is None
        assert image_rotary_emb is not None
        query, key, value = (
            _heads(linear(hidden_states), attn.head_dim)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = (
                _heads(linear(encoder_hidden_states), attn.head_dim)
                for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        # Turned once, after all that is done to each head alone.
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        # RotaryEmbedding wants angles per item of the batch.
        cos, sin = (angle.expand(query.shape[0], -1, -1) for angle in image_rotary_emb)
        query, key = (
            torch.onnx.ops.rotary_embedding(x.float(), cos, sin, interleaved=True).to(value.dtype)
            for x in (query, key)
        )
        mixed = self.mix(query, key, value).transpose(1, 2).flatten(2, 3)
        if encoder_hidden_states is None:
            return mixed
        length = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](mixed[:, length:]))
        return image, attn.to_add_out(mixed[:, :length])

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of [B, heads, S, size] each."""
        return functional.scaled_dot_product_attention(query, key, value)


def trace(
    checkpoint: Path,
    part: str,
    inputs: Arrays,
    variant: Callable[[nn.Module], nn.Module] | None = None,
) -> onnx_ir.Model:
    """The graph of a part in fp32, with inputs, outputs and free axes named as in `AXES`.

    `inputs` are example arrays; no size of a free axis of theirs gets into the graph. Initializers
    are read from the checkpoint's shards when their numbers are asked for. `variant` makes of the
    part what is traced in its place, of the same `model`.

    Raises:
        BundleError: the shards lack a tensor.
    """
    module, buffers = _skeleton(checkpoint, part, variant)
    names: tuple[str, ...] = module.inputs  # type: ignore[assignment]
    outputs: tuple[str, ...] = module.outputs  # type: ignore[assignment]
    free = tuple({axis: torch.export.Dim.DYNAMIC for axis in AXES[name]} or None for name in names)
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(inputs[name]).to("meta") for name in names),
            dynamo=True,
            dynamic_shapes=free,
            input_names=list(names),
            output_names=list(outputs),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        _fill(program.model.graph, module, buffers, checkpoint / folder_of(part))
        _turn(program.model.graph)
        program.optimize()
    model = _tidy(program.model)
    halves(model)
    return model


def write(
    model: onnx_ir.Model, graph: Path, inline_bytes: int = INLINE_BYTES, small: int = SMALL
) -> None:
    """Write a graph, its weights tensor by tensor; of more than `inline_bytes` in all, those of
    `small` bytes and more go to `<graph>.data`."""
    values = model.graph.initializers.values()
    weights = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    external = f"{graph.name}.data" if weights > inline_bytes else None
    onnx_ir.save(model, str(graph), external_data=external, size_threshold_bytes=small)
    onnx.checker.check_model(str(graph), full_check=True)


def size(graph: Path) -> int:
    """Bytes of a graph and of the weights beside it."""
    data = graph.with_name(f"{graph.name}.data")
    return graph.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _skeleton(
    checkpoint: Path, part: str, variant: Callable[[nn.Module], nn.Module] | None
) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
    """A part on the device "meta", and the numbers of its buffers, which no shard need hold."""
    module = skeleton(checkpoint, part)
    restate(module)
    if variant is not None:
        module = variant(module)
    # Before `to`, which changes the module itself.
    buffers = dict(module.named_buffers())
    return module.to("meta"), buffers


def _fill(
    graph: onnx_ir.Graph,
    module: nn.Module,
    buffers: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    """Give every initializer the shards' tensor, or the buffer, that it stands for."""
    weights = of_module(module, folder)
    for key, value in graph.initializers.items():
        if key in weights:
            assert value.const_value is not None
            value.const_value = named(cast(weights[key], value.const_value.dtype), key)
        elif key in buffers:
            value.const_value = onnx_ir.Tensor(buffers[key].numpy(), name=key)


def _turn(graph: onnx_ir.Graph) -> None:
    """Weights behind a Transpose -> transposed weights: a MatMul wants [in, out]."""
    for node in tuple(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
            continue
        assert weight.const_value is not None
        order = node.attributes["perm"].as_ints()
        if list(order) != [1, 0]:
            continue
        tensor = transposed(weight.const_value)
        weight.const_value = tensor
        weight.shape = onnx_ir.Shape(tensor.shape)
        node.outputs[0].replace_all_uses_with(weight)
        graph.remove(node, safe=True)


def restate(part: nn.Module) -> None:
    """Put the two modules above into a Flux transformer."""
    from diffusers import FluxTransformer2DModel

    model = part.model
    if isinstance(model, FluxTransformer2DModel):
        model.pos_embed = RotaryAngles(model.pos_embed.theta, tuple(model.pos_embed.axes_dim))
        model.set_attn_processor(RotaryAttention())


def _heads(states: torch.Tensor, size: int) -> torch.Tensor:
    """[B, S, heads * size] -> [B, S, heads, size]."""
    batch, length, width = states.shape
    return states.view(batch, length, width // size, size)


def _tidy(model: onnx_ir.Model) -> onnx_ir.Model:
    """Name nodes and weights after the modules they come from; say everything once."""
    taken = {node.name for node in model.graph}
    # A block of Flux ends with the sum that in fp16 may pass its largest number (`export.lower`).
    sums: dict[str, onnx_ir.Node] = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        # A printed Python list: the scopes from the outermost to the node itself.
        scope = scopes.strip("[]").replace("'", "").split(", ")[-2:-1]
        module = scope[0].removeprefix("model.") if scope else ""
        held = node.inputs[1] if node.op_type == "Conv" else None
        if held is not None and held.is_initializer() and str(held.name).endswith(".weight"):
            # The optimizer puts a batch normalisation into the convolution before it, and what it
            # makes of the two has the scope of the first and the weights' name of the second.
            module = str(held.name).removeprefix("model.").removesuffix(".weight")
        if node.op_type == "Add" and _FLUX_BLOCK.fullmatch(module):
            sums[module] = node
        if node.op_type == "Attention" and module and module not in taken:
            node.name = module
            taken.add(module)
        if node.op_type in ("MatMul", "Gemm", "Conv") and module and module not in taken:
            node.name = module
            taken.add(module)
            weight = node.inputs[1]
            # The exporter transposes the weights of a MatMul once, and numbers the result.
            if weight is not None and weight.is_initializer() and len(weight.uses()) == 1:
                _rename(model.graph, weight, f"{module}.weight")
    for block, node in sums.items():
        node.name = f"{block}.{RESIDUAL}"
    for value in tuple(model.graph.initializers.values()):
        _rename(model.graph, value, str(value.name).removeprefix("model."))
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        for axis, name in AXES[str(value.name)].items():
            value.shape[axis] = name
    # Metadata holds stack traces, and with them the paths of the machine that exported.
    for step in (
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    return model


def _rename(graph: onnx_ir.Graph, weight: onnx_ir.Value, name: str) -> None:
    if name not in graph.initializers:
        graph.initializers.pop(str(weight.name))
        weight.name = name
        graph.initializers[name] = weight


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of internals of its own and of axis names, which are set afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
