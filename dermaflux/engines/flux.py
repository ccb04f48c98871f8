"""The transformer of Flux as pure functions of torch: weights and tokens in, a velocity out.

What diffusers' FluxTransformer2DModel computes, in an order that asks less of the machine:

* what depends on timestep, guidance and pooled text alone (all modulation: 27 % of FLUX.1's
  weights) is one matrix product for all steps to come, `modulated`;
* rotary tables and the embedded text are made once per request, `rotary` and `embedded`;
* query, key and value are one linear layer, in single blocks together with the way up of the MLP;
* a normalisation and its modulation are one operation where a batch is of one item.

Both kinds of blocks are functions of tensors alone, so that one compilation serves all blocks of a
kind. `dermaflux.engines.flux_weights` makes the weights, `flux_engine` beside it the engine.

    >>> table = modulated(flux, timesteps, pooled, guidance)        # [rows, vectors, D]
    >>> velocity(flux, tokens, embedded(flux, text), table, rotary(flux.axes, ids))

Equal to diffusers' forward within rounding: the tests hold it to 1e-5 of the largest value in
fp32. Sources: black-forest-labs/flux `model.py`; diffusers' `transformer_flux.py`, whose order of
tokens (text before image), layout of modulation and eps (1e-6) these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dermaflux.engines.flux_fp8 import product

EPS: Final = 1e-6
DOUBLE: Final = 6
"""Vectors that modulate one stream of a double block: shift, scale and gate, twice."""
SINGLE: Final = 3
"""Those of a single block: shift, scale and gate."""
FREQUENCIES: Final = 256
"""Channels of the sinusoids that timestep and guidance become."""
_PERIOD: Final = 10_000.0
_HALF: Final = 65_504.0
"""The largest number in float16, to which diffusers clips tokens of that type."""


class Linear(NamedTuple):
    """weight [out, in] and bias [out]; in fp8 also `scale`, float32 [out], of the rows."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None


class Stream(NamedTuple):
    """One of the two streams of a double block: of the image, or of the text."""

    qkv: Linear
    query_norm: Tensor
    key_norm: Tensor
    out: Linear
    up: Linear
    down: Linear


class Double(NamedTuple):
    """A block in which image and text meet in attention alone."""

    image: Stream
    text: Stream


class Single(NamedTuple):
    """A block over text and image together; `qkv_up` is query, key, value and the MLP's way up."""

    qkv_up: Linear
    query_norm: Tensor
    key_norm: Tensor
    down: Linear


class Flux(NamedTuple):
    """All weights. `modulation` gives the vectors of all blocks in their order, and two of the end.

    `time`, `pooled` and `guidance` (None where the model has none) are both layers of an embedder.
    """

    heads: int
    axes: tuple[int, ...]
    image_in: Linear
    text_in: Linear
    time: tuple[Linear, Linear]
    pooled: tuple[Linear, Linear]
    guidance: tuple[Linear, Linear] | None
    modulation: Linear
    doubles: tuple[Double, ...]
    singles: tuple[Single, ...]
    out: Linear


DoubleBlock = Callable[[Double, int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SingleBlock = Callable[[Single, int, Tensor, Tensor, Tensor], Tensor]


def linear(x: Tensor, layer: Linear) -> Tensor:
    """x [..., in] -> [..., out]."""
    if layer.scale is not None:
        return product(x, layer.weight, layer.scale, layer.bias)
    return functional.linear(x, layer.weight, layer.bias)


def velocity(
    flux: Flux,
    tokens: Tensor,
    text: Tensor,
    vectors: Tensor,
    turn: Tensor,
    double: DoubleBlock | None = None,
    single: SingleBlock | None = None,
) -> Tensor:
    """Tokens [B, N, 4C], embedded text [B, T, D], vectors [B, V, D] -> velocity [B, N, 4C].

    `turn` is what `rotary` gives for the positions of text and image. `double` and `single` are
    what runs the blocks: the functions here, or compiled ones.
    """
    double, single = double or double_block, single or single_block
    image, at = linear(tokens, flux.image_in), 0
    for two in flux.doubles:
        image, text = double(two, flux.heads, image, text, vectors[:, at : at + 2 * DOUBLE], turn)
        at += 2 * DOUBLE
    both = torch.cat([text, image], dim=1)
    for one in flux.singles:
        both = single(one, flux.heads, both, vectors[:, at : at + SINGLE], turn)
        at += SINGLE
    scale, shift = vectors[:, at], vectors[:, at + 1]
    return linear(normed(both[:, text.shape[1] :], scale, shift), flux.out)


def double_block(
    block: Double, heads: int, image: Tensor, text: Tensor, vectors: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor]:
    """Image [B, N, D] and text [B, T, D] -> both; vectors [B, 12, D], the image's first."""
    streams = (
        (text, block.text, vectors[:, DOUBLE:]),
        (image, block.image, vectors[:, :DOUBLE]),
    )
    parts = [
        _heads(linear(normed(x, v[:, 1], v[:, 0]), s.qkv), heads, s.query_norm, s.key_norm)
        for x, s, v in streams
    ]
    query, key, value = (torch.cat(two, dim=1) for two in zip(*parts, strict=True))
    mixed = attention(turned(query, turn), turned(key, turn), value)
    length = text.shape[1]
    ends = []
    for x, stream, v, seen in zip(
        *zip(*streams, strict=True), (mixed[:, :length], mixed[:, length:]), strict=True
    ):
        x = torch.addcmul(x, v[:, None, 2], linear(seen, stream.out))
        inner = linear(normed(x, v[:, 4], v[:, 3]), stream.up)
        grown = functional.gelu(inner, approximate="tanh")
        ends.append(torch.addcmul(x, v[:, None, 5], linear(grown, stream.down)))
    return ends[1], _clipped(ends[0])


def single_block(block: Single, heads: int, both: Tensor, vectors: Tensor, turn: Tensor) -> Tensor:
    """Text and image [B, S, D] -> the same; vectors [B, 3, D]."""
    width = both.shape[-1]
    wide = linear(normed(both, vectors[:, 1], vectors[:, 0]), block.qkv_up)
    qkv, up = wide.split((3 * width, wide.shape[-1] - 3 * width), dim=-1)
    query, key, value = _heads(qkv, heads, block.query_norm, block.key_norm)
    mixed = attention(turned(query, turn), turned(key, turn), value)
    grown = functional.gelu(up, approximate="tanh")
    moved = linear(torch.cat([mixed, grown], dim=-1), block.down)
    return _clipped(torch.addcmul(both, vectors[:, None, 2], moved))


def normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of x [B, S, D], times `scale` plus `shift`, both [B, D]; 1 is in `scale`."""
    width = (x.shape[-1],)
    if x.shape[0] == 1:
        return functional.layer_norm(x, width, scale[0], shift[0], EPS)
    return torch.addcmul(shift[:, None], functional.layer_norm(x, width, eps=EPS), scale[:, None])


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, S, heads, width] of each -> [B, S, heads * width]. Flux masks nothing."""
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return mixed.transpose(1, 2).flatten(2)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring channels of x [B, S, heads, width] turned by their angle: rotary positions.

    As complex numbers where nothing is compiled: fewer passes over memory. Compilers take the
    numbers apart, for Inductor makes no code for complex ones.
    """
    pairs, turn = x.float().unflatten(-1, (-1, 2)), turn[:, None]
    if not torch.compiler.is_compiling():
        moved = torch.view_as_complex(pairs) * torch.view_as_complex(turn)
        return torch.view_as_real(moved).flatten(-2).to(x.dtype)
    (real, imaginary), (cosine, sine) = pairs.unbind(-1), turn.unbind(-1)
    parts = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return torch.stack(parts, dim=-1).flatten(-2).to(x.dtype)


def rotary(axes: tuple[int, ...], ids: Tensor) -> Tensor:
    """Ids [S, axes] and channels of each axis -> cosines and sines, float32 [S, width / 2, 2].

    In float64, as diffusers has it: float32 loses digits of the angle at far positions.
    """
    angles = []
    for axis, channels in enumerate(axes):
        powers = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angles.append(torch.outer(ids[:, axis].double(), _PERIOD**-powers))
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def embedded(flux: Flux, text: Tensor) -> Tensor:
    """Encoded text [B, T, E] -> [B, T, D]: what the first block is given."""
    return linear(text, flux.text_in)


def modulated(flux: Flux, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
    """Timesteps [R] (0..1), pooled text [R, P], guidance [R] -> vectors [R, V, D].

    One row is one item at one step; scales have their 1 added.
    """
    joined = _mlp(_sinusoids(timesteps, pooled.dtype), flux.time)
    if flux.guidance is not None and guidance is not None:
        joined = joined + _mlp(_sinusoids(guidance, pooled.dtype), flux.guidance)
    joined = joined + _mlp(pooled, flux.pooled)
    table = linear(functional.silu(joined), flux.modulation)
    table = table.view(len(table), -1, joined.shape[-1])
    table[:, scales(len(flux.doubles), len(flux.singles))] += 1
    return table


def scales(doubles: int, singles: int) -> list[int]:
    """Which of the vectors are scales; the others are shifts and gates."""
    start = 2 * DOUBLE * doubles
    found = [at + 1 for at in range(0, start, DOUBLE // 2)]
    found += [start + SINGLE * index + 1 for index in range(singles)]
    return [*found, start + SINGLE * singles]


def _mlp(x: Tensor, layers: tuple[Linear, Linear]) -> Tensor:
    return linear(functional.silu(linear(x, layers[0])), layers[1])


def _sinusoids(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[R] -> [R, 256]: cosines, then sines, of 1000 times the values (diffusers' `Timesteps`).

    The values are rounded to `dtype` before, as diffusers does.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = (values.to(dtype) * 1000).float()[:, None] * torch.exp(
        -math.log(_PERIOD) * steps / half
    )
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _heads(
    qkv: Tensor, heads: int, query_norm: Tensor, key_norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3D] -> query, key and value [B, S, heads, width], the first two normalised."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    width = (query.shape[-1],)
    return (
        functional.rms_norm(query, width, query_norm, EPS),
        functional.rms_norm(key, width, key_norm, EPS),
        value,
    )


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-_HALF, _HALF) if x.dtype == torch.float16 else x
