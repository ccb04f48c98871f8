"""Weights of `dermaflux.engines.flux` under diffusers' names: from a checkpoint, or random.

Tensors are fused one block after the other while they are read, so that beside the fused weights no
more than one block is in memory twice.

    >>> opened(Path("models/mini/transformer"), torch.bfloat16, torch.device("cuda"))
    >>> randomly(config, torch.bfloat16, torch.device("cuda"), seed=0)   # without a checkpoint
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dermaflux.engines import flux_fp8
from dermaflux.engines.flux import (
    DOUBLE,
    FREQUENCIES,
    SINGLE,
    Double,
    Flux,
    Linear,
    Single,
    Stream,
)
from dermaflux.errors import EngineError

_INDEX: Final = "diffusion_pytorch_model.safetensors.index.json"
_WHOLE: Final = "diffusion_pytorch_model.safetensors"
_GROWTH: Final = 4
"""How many times wider a block's MLP is than its tokens."""
_STREAMS: Final = {
    "image": (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.norm_q", "attn.norm_k"),
        "attn.to_out.0",
        "ff",
    ),
    "text": (
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("attn.norm_added_q", "attn.norm_added_k"),
        "attn.to_add_out",
        "ff_context",
    ),
}

Named = Callable[[str], Tensor]


def opened(
    folder: Path, dtype: torch.dtype, device: torch.device, low: Collection[str] = ()
) -> Flux:
    """The weights of a checkpoint's transformer; those of the kinds `low` in fp8.

    Raises:
        EngineError: files or tensors are missing, or do not fit the config.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = _files(folder)
        with ExitStack() as stack:
            streams = {
                name: stack.enter_context(safe_open(folder / name, "pt"))
                for name in set(files.values())
            }
            wanted = shapes(config)

            def named(name: str) -> Tensor:
                if name not in files:
                    raise EngineError(f"the transformer in {folder} has no tensor {name}")
                tensor: Tensor = streams[files[name]].get_tensor(name)
                if tuple(tensor.shape) != wanted[name]:
                    raise EngineError(
                        f"{name} in {folder} is {tuple(tensor.shape)}; its config.json asks for "
                        f"{wanted[name]}"
                    )
                return tensor.to(device, dtype)

            return fused(config, named, low)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngineError(f"the transformer in {folder} cannot be opened: {error}") from error


def randomly(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    low: Collection[str] = (),
    seed: int = 0,
) -> Flux:
    """Random weights of a config's shapes, made on the device: normal, of variance 1 / inputs.

    So that activations keep their size over blocks, and no number is out of range. Norms are 1.
    """
    wanted = shapes(config)

    def named(name: str) -> Tensor:
        return fill(name, torch.empty(wanted[name], dtype=dtype, device=device), seed)

    return fused(config, named, low)


def fill(name: str, tensor: Tensor, seed: int) -> Tensor:
    """Random weights in place, the same for a name, a seed and a device whatever came before."""
    if "attn.norm" in name:
        return tensor.fill_(1)
    own = torch.Generator(device=tensor.device).manual_seed(seed + zlib.crc32(name.encode()))
    deviation = tensor.shape[1] ** -0.5 if tensor.ndim == 2 else 0.02
    return tensor.normal_(0, deviation, generator=own)


def fused(config: Mapping[str, Any], named: Named, low: Collection[str] = ()) -> Flux:
    """Weights by diffusers' names -> ours; `named` is asked once for each.

    Raises:
        EngineError: `low` has a kind that is not known.
    """
    wanted = shapes(config)
    unknown = sorted(set(low) - set(flux_fp8.KINDS))
    if unknown:
        raise EngineError(f"{unknown[0]} is no kind of layer; use {', '.join(flux_fp8.KINDS)}")

    def joined(names: Sequence[str], kind: str = "") -> Linear:
        weight, bias = (
            _stacked([(f"{name}.{end}", wanted[f"{name}.{end}"]) for name in names], named)
            for end in ("weight", "bias")
        )
        if kind not in low:
            return Linear(weight, bias)
        numbers, scale = flux_fp8.quantized(weight)
        return Linear(numbers, bias, scale)

    def stream(prefix: str, which: str) -> Stream:
        qkv, norms, out, mlp = _STREAMS[which]
        return Stream(
            joined([f"{prefix}.{name}" for name in qkv], f"{which}.qkv"),
            named(f"{prefix}.{norms[0]}.weight"),
            named(f"{prefix}.{norms[1]}.weight"),
            joined([f"{prefix}.{out}"], f"{which}.out"),
            joined([f"{prefix}.{mlp}.net.0.proj"], f"{which}.up"),
            joined([f"{prefix}.{mlp}.net.2"], f"{which}.down"),
        )

    def single(prefix: str) -> Single:
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        return Single(
            joined([f"{prefix}.{name}" for name in names], "single.qkv_up"),
            named(f"{prefix}.attn.norm_q.weight"),
            named(f"{prefix}.attn.norm_k.weight"),
            joined([f"{prefix}.proj_out"], "single.down"),
        )

    def embedder(name: str) -> tuple[Linear, Linear]:
        prefix = f"time_text_embed.{name}"
        return joined([f"{prefix}.linear_1"]), joined([f"{prefix}.linear_2"])

    doubles = [f"transformer_blocks.{i}" for i in range(config["num_layers"])]
    singles = [f"single_transformer_blocks.{i}" for i in range(config["num_single_layers"])]
    return Flux(
        heads=config["num_attention_heads"],
        axes=tuple(config["axes_dims_rope"]),
        image_in=joined(["x_embedder"], "image_in"),
        text_in=joined(["context_embedder"], "text_in"),
        time=embedder("timestep_embedder"),
        pooled=embedder("text_embedder"),
        guidance=embedder("guidance_embedder") if config["guidance_embeds"] else None,
        modulation=joined(list(_modulators(config)), "modulation"),
        doubles=tuple(Double(stream(name, "image"), stream(name, "text")) for name in doubles),
        singles=tuple(single(name) for name in singles),
        out=joined(["proj_out"], "out"),
    )


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of diffusers' FluxTransformer2DModel of this config, by its name there."""
    head = config["attention_head_dim"]
    d = head * config["num_attention_heads"]
    channels = config["in_channels"]
    ends = (config.get("out_channels") or channels) * config.get("patch_size", 1) ** 2
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, outputs: int, inputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    for name, inputs in (
        ("timestep_embedder", FREQUENCIES),
        ("text_embedder", config["pooled_projection_dim"]),
        *([("guidance_embedder", FREQUENCIES)] if config["guidance_embeds"] else []),
    ):
        layer(f"time_text_embed.{name}.linear_1", d, inputs)
        layer(f"time_text_embed.{name}.linear_2", d, d)
    layer("context_embedder", d, config["joint_attention_dim"])
    layer("x_embedder", d, channels)
    for name, vectors in _modulators(config).items():
        layer(name, vectors * d, d)
    for i in range(config["num_layers"]):
        for qkv, norms, out, mlp in _STREAMS.values():
            for name in (*qkv, out):
                layer(f"transformer_blocks.{i}.{name}", d, d)
            found |= {f"transformer_blocks.{i}.{name}.weight": (head,) for name in norms}
            layer(f"transformer_blocks.{i}.{mlp}.net.0.proj", _GROWTH * d, d)
            layer(f"transformer_blocks.{i}.{mlp}.net.2", d, _GROWTH * d)
    for i in range(config["num_single_layers"]):
        prefix = f"single_transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v"):
            layer(f"{prefix}.attn.{name}", d, d)
        found |= {f"{prefix}.attn.{name}.weight": (head,) for name in ("norm_q", "norm_k")}
        layer(f"{prefix}.proj_mlp", _GROWTH * d, d)
        layer(f"{prefix}.proj_out", d, (1 + _GROWTH) * d)
    layer("proj_out", ends, d)
    return found


def size(flux: Flux) -> int:
    """Bytes of all weights, as they lie in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(flux))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _tensors(one)


def _modulators(config: Mapping[str, Any]) -> dict[str, int]:
    """The layers that make modulation, in the order of `Flux.modulation`, and their vectors."""
    found = {
        f"transformer_blocks.{i}.{norm}.linear": DOUBLE
        for i in range(config["num_layers"])
        for norm in ("norm1", "norm1_context")
    }
    for i in range(config["num_single_layers"]):
        found[f"single_transformer_blocks.{i}.norm.linear"] = SINGLE
    found["norm_out.linear"] = 2
    return found


def _stacked(names: Sequence[tuple[str, tuple[int, ...]]], named: Named) -> Tensor:
    """Tensors below each other, written one by one into what they become."""
    whole: Tensor | None = None
    at = 0
    for name, shape in names:
        tensor = named(name)
        if len(names) == 1:
            return tensor
        if whole is None:
            rows = sum(shape[0] for _, shape in names)
            whole = tensor.new_empty((rows, *shape[1:]))
        whole[at : at + shape[0]] = tensor
        at += shape[0]
    assert whole is not None
    return whole


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> the file that has it."""
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    with safe_open(folder / _WHOLE, "pt") as stream:
        return dict.fromkeys(stream.keys(), _WHOLE)
