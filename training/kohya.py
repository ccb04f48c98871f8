"""Names and fused layers of the adapters that kohya's sd-scripts write for FLUX.1.

They follow Black Forest Labs' own model: q, k and v of a stream are one layer (`img_attn_qkv`), and
a single-stream block's q, k, v and the input of its MLP are one (`linear1`). So diffusers' 494
layers are 304 modules there. Layers of their own are written block-diagonally: `down` holds theirs
below each other, `up` holds theirs along its diagonal, and the rank is the sum of theirs
(sd-scripts' networks/lora_flux.py does so where `split_qkv` is on; diffusers recognises it).

    >>> parts("lora_unet_double_blocks_0_img_attn_proj")
    ('transformer.transformer_blocks.0.attn.to_out.0',)
    >>> module("transformer.single_transformer_blocks.37.proj_mlp")
    ('lora_unet_single_blocks_37_linear1', 3)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from training.factors import Factors

PREFIXES: Final = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")

_DOUBLE: Final[Mapping[str, tuple[str, ...]]] = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE: Final[Mapping[str, tuple[str, ...]]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCKS: Final = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}
_OUTSIDE: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_SWAPPED: Final = "lora_unet_final_layer_adaLN_modulation_1"
"""Black Forest Labs' last modulation gives (shift, scale), diffusers' gives (scale, shift)."""

_BLOCK: Final = re.compile(r"lora_unet_(double_blocks|single_blocks)_(\d+)_(\w+)")
_CLIP: Final = re.compile(
    r"lora_te1?_text_model_encoder_layers_(\d+)_"
    r"(self_attn|mlp)_(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)
# sd-scripts counted T5 as the second encoder before it took the third's name, as ComfyUI has it.
_T5: Final = re.compile(
    r"lora_te[23]_encoder_block_(\d+)_layer_(\d+)_"
    r"(SelfAttention|DenseReluDense)_(q|k|v|o|wi|wi_0|wi_1|wo)"
)


def parts(name: str) -> tuple[str, ...]:
    """The layers, in diffusers' names, that a module of kohya's holds; () where it is not known."""
    if match := _BLOCK.fullmatch(name):
        blocks, number, rest = match.groups()
        ours, table = _BLOCKS[blocks]
        return tuple(f"transformer.{ours}.{number}.{one}" for one in table.get(rest, ()))
    if match := _CLIP.fullmatch(name):
        layer, group, one = match.groups()
        return (f"text_encoder.encoder.layers.{layer}.{group}.{one}",)
    if match := _T5.fullmatch(name):
        block, layer, group, one = match.groups()
        return (f"text_encoder_2.encoder.block.{block}.layer.{layer}.{group}.{one}",)
    outside = _OUTSIDE.get(name.removeprefix("lora_unet_"))
    return (f"transformer.{outside}",) if outside else ()


def module(layer: str) -> tuple[str, int]:
    """The module of kohya's that holds a layer, and its place in it; ("", 0) where none does."""
    part, _, rest = layer.partition(".")
    if part == "transformer":
        for theirs, (ours, table) in _BLOCKS.items():
            if match := re.fullmatch(rf"{ours}\.(\d+)\.(.+)", rest):
                for name, layers in table.items():
                    if match[2] in layers:
                        return f"lora_unet_{theirs}_{match[1]}_{name}", layers.index(match[2])
        found = [theirs for theirs, ours in _OUTSIDE.items() if ours == rest]
        return (f"lora_unet_{found[0]}", 0) if found else ("", 0)
    prefix = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te3_"}.get(part, "")
    name = prefix + rest.replace(".", "_")
    return (name, 0) if parts(name) == (layer,) else ("", 0)


def sizes(name: str, rows: int) -> tuple[int, ...]:
    """How many of a module's `rows` outputs belong to each of its parts; () where it cannot be.

    The MLP of a single-stream block is four times as wide as its attention, in FLUX.1 and in
    diffusers' FluxSingleTransformerBlock, which has no setting for it.
    """
    count = len(parts(name))
    shares = {1: (1,), 3: (1, 1, 1), 4: (1, 1, 1, 4)}[count]
    if rows % sum(shares):
        return ()
    return tuple(share * rows // sum(shares) for share in shares)


def split(
    name: str, down: Tensor, up: Tensor, alpha: float, ranks: Sequence[int] = ()
) -> tuple[Factors | None, ...]:
    """A module's parts, in the order of `parts`; their deltas are its rows.

    `ranks` are those of the parts, where the module was written block-diagonally and they were
    told (0: the part has no adapter). Untold, a block-diagonal `up` of equal ranks is recognised;
    any other part has rows of `up` of its own, and the whole of `down`.
    """
    scale = alpha / down.shape[0]
    if name == _SWAPPED:
        up = torch.cat(up.chunk(2)[::-1])
    rows = up.split(sizes(name, up.shape[0]))
    if not ranks and _diagonal(up, [len(one) for one in rows]):
        ranks = [down.shape[0] // len(rows)] * len(rows)
    if not ranks or len(rows) == 1:
        return tuple(Factors(down, one, alpha) for one in rows)
    downs = down.split(list(ranks))
    ups = [one.split(list(ranks), dim=1)[place] for place, one in enumerate(rows)]
    return tuple(
        Factors(one.contiguous(), other.contiguous(), scale * rank) if rank else None
        for one, other, rank in zip(downs, ups, ranks, strict=True)
    )


def fused(name: str, factors: Sequence[Factors | None]) -> tuple[Factors, tuple[int, ...]]:
    """One module of its parts, and their ranks where it is block-diagonal (else ()).

    A part that has no adapter is None; at least one has. The first one's `alpha / rank` becomes the
    module's, and `up` of the others is scaled to it.
    """
    present = [one for one in factors if one is not None]
    first = present[0]
    if len(factors) == 1:
        up = torch.cat(first.up.chunk(2)[::-1]) if name == _SWAPPED else first.up
        return Factors(first.down, up, first.alpha), ()
    shared = len(present) == len(factors) and all(
        one.alpha == first.alpha and torch.equal(one.down, first.down) for one in present
    )
    if shared:
        return Factors(first.down, torch.cat([one.up for one in present]), first.alpha), ()
    ranks = tuple(one.rank if one else 0 for one in factors)
    narrow = next((len(one.up) for one in factors[:3] if one), None) or len(present[0].up) // 4
    heights = sizes(name, narrow * (7 if len(factors) == 4 else 3))
    scale = first.scale or next((one.scale for one in present if one.scale), 1.0)
    up = first.up.new_zeros(sum(heights), sum(ranks))
    row = column = 0
    for one, height, rank in zip(factors, heights, ranks, strict=True):
        if one is not None:
            part = one.up if one.scale == scale else one.up * (one.scale / scale)
            up[row : row + height, column : column + rank] = part
        row, column = row + height, column + rank
    return Factors(torch.cat([one.down for one in present]), up, scale * sum(ranks)), ranks


def _diagonal(up: Tensor, heights: Sequence[int]) -> bool:
    """Whether `up` is block-diagonal in blocks of equal rank, and not empty altogether."""
    count = len(heights)
    if count == 1 or up.shape[1] % count:
        return False
    blocks = [one.chunk(count, dim=1) for one in up.split(list(heights))]
    others = (blocks[i][j] for i in range(count) for j in range(count) if i != j)
    return bool(up.any()) and not any(bool(one.any()) for one in others)
