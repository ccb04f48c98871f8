"""Flux's attention with fewer passes over memory than diffusers' processor, and equal numbers.

Layers that read one input are one product over their merged weights side by side; the norm of
queries and keys and their rotation are one function that keeps its input alone. Where the frozen
weights are not float32, or a layer is not adapted, the layers compute for themselves.

    >>> transformer.set_attn_processor(Attention())
    >>> end_early(transformer)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.lora.layers import LoraLinear, by_factors, by_weight


def end_early(transformer: Any) -> None:
    """Let the last block answer for the picture alone: what it makes of the text is thrown away,
    so it needs the text's keys and values and nothing else. In place; outputs stay equal."""
    if len(transformer.single_transformer_blocks):
        last = transformer.single_transformer_blocks[-1]
        last.forward = partial(_last, last)


def _last(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None, joint_attention_kwargs: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`FluxSingleTransformerBlock.forward` without the text's queries, MLP and result."""
    length, attn = encoder_hidden_states.shape[1], block.attn
    assert image_rotary_emb is not None
    cos, sin = image_rotary_emb
    normed, gate = block.norm(torch.cat([encoder_hidden_states, hidden_states], dim=1), emb=temb)
    image = normed[:, length:].contiguous()
    key, value = _heads(attn, normed, (attn.to_k, attn.to_v))
    (query,) = _heads(attn, image, (attn.to_q,))
    query = _turned(query, attn.norm_q, cos[length:], sin[length:])
    key = _turned(key, attn.norm_k, cos, sin)
    seen = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    mlp = block.act_mlp(block.proj_mlp(image))
    result = block.proj_out(torch.cat([seen.transpose(1, 2).flatten(2), mlp], dim=2))
    return encoder_hidden_states, hidden_states + gate.unsqueeze(1) * result


class Attention:
    """For `FluxTransformer2DModel.set_attn_processor`: what `FluxAttnProcessor` computes."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        assert attention_mask is None
        assert image_rotary_emb is not None
        cos, sin = image_rotary_emb
        length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        image = slice(length, None)
        query, key, value = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v))
        query = _turned(query, attn.norm_q, cos[image], sin[image])
        key = _turned(key, attn.norm_k, cos[image], sin[image])
        if encoder_hidden_states is not None:
            text = slice(length)
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            q, k, v = _heads(attn, encoder_hidden_states, layers)
            q = _turned(q, attn.norm_added_q, cos[text], sin[text])
            k = _turned(k, attn.norm_added_k, cos[text], sin[text])
            query, key, value = (
                torch.cat(pair, dim=1) for pair in ((q, query), (k, key), (v, value))
            )
        seen = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        result: Tensor = seen.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return result
        of_text, of_image = result.split([length, result.shape[1] - length], dim=1)
        # to_out's second layer is a dropout of 0.
        return attn.to_out[0](of_image.contiguous()), attn.to_add_out(of_text.contiguous())


def _heads(attn: Any, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Queries, keys and values, each [B, S, heads, width of a head]."""
    return [part.unflatten(-1, (-1, attn.head_dim)) for part in together(x, layers)]


def together(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """What layers make of one input: as one product where all of them would merge anyway."""
    rows = x.numel() // x.shape[-1]
    loras = [layer for layer in layers if isinstance(layer, LoraLinear) and layer.merges(rows)]
    if len(loras) < len(layers):
        return [layer(x) for layer in layers]
    given: list[Any] = []
    for layer in loras:
        given += [layer.weight, layer.bias, layer.down, layer.up, layer.scale]
    whole: Tensor = _Together.apply(x, *given)
    parts: Sequence[Tensor] = whole.split([layer.weight.shape[0] for layer in loras], dim=-1)
    return parts


class _Together(torch.autograd.Function):
    """x, then (weight, bias, down, up, scale) of each layer -> their results side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        layers = [given[start : start + 5] for start in range(0, len(given), 5)]
        flat = x.reshape(-1, x.shape[-1])
        merged = torch.cat([torch.addmm(w, up, down, alpha=s) for w, _, down, up, s in layers])
        biases = [bias for _, bias, *_ in layers if bias is not None]
        bias = torch.cat(biases) if len(biases) == len(layers) else None
        ctx.save_for_backward(flat, merged, *(f for _, _, *pair, _ in layers for f in pair))
        ctx.scales, ctx.shape = [s for *_, s in layers], x.shape
        return F.linear(flat, merged, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, merged, *pairs = ctx.saved_tensors
        above = gradients[0].reshape(-1, gradients[0].shape[-1])
        downs, ups = pairs[::2], pairs[1::2]
        outs = [up.shape[0] for up in ups]
        sizes = (flat.shape[0], *merged.shape, downs[0].shape[0])
        found: list[Tensor | None] = []
        if by_weight(*sizes) < by_factors(*sizes):
            parts = (above.t() @ flat).split(outs)
            pairs = [(up.t() @ p, p @ d.t()) for p, d, up in zip(parts, downs, ups, strict=True)]
        else:
            # Products of rank r are small; side by side they are a third as many, and faster.
            ranks = [down.shape[0] for down in downs]
            slices = above.split(outs, dim=1)
            reduced = (flat @ torch.cat(downs).t()).split(ranks, dim=1)
            inner = torch.cat([g @ up for g, up in zip(slices, ups, strict=True)], dim=1)
            of_downs = (inner.t() @ flat).split(ranks)
            of_ups = [g.t() @ low for g, low in zip(slices, reduced, strict=True)]
            pairs = list(zip(of_downs, of_ups, strict=True))
        for (of_down, of_up), scale in zip(pairs, ctx.scales, strict=True):
            scaled = (of_down, of_up) if scale == 1 else (of_down * scale, of_up * scale)
            found += [None, None, *scaled, None]
        below = (above @ merged).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return below, *found


def _turned(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """RMS norm and rotation of [B, S, heads, D]; cos and sin are [S, D], each value twice."""
    weight = norm.weight
    if torch.compiler.is_compiling():
        # The compiler fuses these by itself, and knows no complex numbers.
        normed = norm(x)
        real, imaginary = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None, ::2], sin[:, None, ::2]
        pairs = torch.stack((real * c - imaginary * s, imaginary * c + real * s), -1)
        return pairs.flatten(-2).to(x.dtype)
    turns = torch.complex(cos[:, ::2], sin[:, ::2])[:, None]
    turned: Tensor = _NormedAndTurned.apply(x, weight, turns, norm.eps)
    return turned


class _NormedAndTurned(torch.autograd.Function):
    """In float32; for the backward pass it keeps its input, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
        full = x.float()
        inverse = full.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (full * inverse).mul_(weight)
        torch.view_as_complex(normed.unflatten(-1, (-1, 2))).mul_(turns)
        ctx.save_for_backward(x, weight, turns, inverse)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns, inverse = ctx.saved_tensors
        above = gradients[0].float().contiguous()
        back = torch.view_as_complex(above.unflatten(-1, (-1, 2))) * turns.conj()
        of_normed = torch.view_as_real(back).flatten(-2).mul_(weight)
        unit = x.float() * inverse
        share = (of_normed * unit).mean(-1, keepdim=True)
        below = of_normed.sub_(unit.mul_(share)).mul_(inverse)
        return below.to(x.dtype), None, None, None
