"""BFL's single file of a Flux transformer -> diffusers' model, tensor by tensor.

BFL fuses what reads the same input: `qkv` in double blocks, and queries, keys, values and the
MLP's first layer in `linear1` of single ones. diffusers has them apart, and has scale and shift of
the last modulation the other way round. diffusers' own converter knows FLUX.1's width alone; this
one takes any, and holds the model and one tensor.

    >>> transformer(Path("flux1-dev.safetensors"), Path("parts/transformer/config.json"), dtype)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dermaflux.errors import BundleError

_TOP: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE: Final = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE: Final = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_QKV: Final = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_PREFIX: Final = "model.diffusion_model."


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of BFL's file as diffusers has it: one, or several views of it.

    Raises:
        KeyError: BFL has no such tensor.
    """
    path, _, kind = name.removeprefix(_PREFIX).rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if path == "final_layer.adaLN_modulation.1":
        shift, scale = tensor.chunk(2)
        yield f"norm_out.linear.{kind}", torch.cat([scale, shift])
        return
    if path in _TOP:
        yield f"{_TOP[path]}.{kind}", tensor
        return
    stack, number, layer = path.split(".", 2) if path.count(".") > 1 else (path, "", "")
    if stack == "double_blocks" and layer in _QKV:
        for part, rows in zip(_QKV[layer], tensor.chunk(3), strict=True):
            yield f"transformer_blocks.{number}.{part}.{kind}", rows
    elif stack == "double_blocks":
        yield f"transformer_blocks.{number}.{_DOUBLE[layer]}.{kind}", tensor
    elif stack == "single_blocks" and layer == "linear1":
        # Rows: three of the width, then four times the width of the MLP.
        width = tensor.shape[0] // 7
        parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        for part, rows in zip(parts, tensor.split([width] * 3 + [4 * width]), strict=True):
            yield f"single_transformer_blocks.{number}.{part}.{kind}", rows
    elif stack == "single_blocks":
        yield f"single_transformer_blocks.{number}.{_SINGLE[layer]}.{kind}", tensor
    else:
        raise KeyError(name)


def transformer(file: Path, config: Path, dtype: torch.dtype) -> Any:
    """diffusers' FluxTransformer2DModel on the CPU, frozen, in `dtype`.

    Raises:
        BundleError: the file is none, a tensor is unknown, missing, or of another shape.
    """
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(json.loads(config.read_text("utf-8")))
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                for key, value in renamed(name, stored.get_tensor(name)):
                    # A copy: a view would keep the fused tensor.
                    found[key] = value.to(dtype, copy=True)
    except SafetensorError as error:
        raise BundleError(f"{file} is no safetensors file: {error}") from error
    except KeyError as error:
        raise BundleError(
            f"{file} has the tensor {error}, which no Flux transformer of BFL has"
        ) from error
    wrong = [
        key for key in wanted.keys() | found.keys()
        if key not in wanted or key not in found or wanted[key].shape != found[key].shape
    ]  # fmt: skip
    if wrong:
        first = min(wrong)
        shapes = [
            tuple(group[first].shape) if first in group else None for group in (found, wanted)
        ]
        raise BundleError(
            f"{file} does not fit {config}: {len(wrong)} tensors differ, such as {first}, which is "
            f"{shapes[0]} in the file and {shapes[1]} in the model"
        )
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_(False)
