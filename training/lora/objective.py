"""Rectified flow: what the model is shown and what it should answer.

A picture's latents x and noise e are mixed by a noise share s, `(1 - s) x + s e`, and the model
predicts the velocity `e - x` (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206).

    >>> s = shares(uniform, "shifted", schedule, image_tokens=1024)
    >>> loss = losses(model(mixed(x, e, s), s), x, e).mean()
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dermaflux.flow import Schedule

_EDGE = 1e-5
"""Uniform numbers stay this far from 0 and 1: logits are finite, within 4.3 deviations."""


def shift(schedule: Schedule, image_tokens: int) -> float:
    """The scheduler's shift of the logits of noise shares: larger pictures keep more noise.

    In `FlowMatchEulerDiscreteScheduler` a share s becomes k s / (1 + (k - 1) s), with k = exp(mu)
    of a line in the number of tokens, or the constant `shift`: its logit grows by log k.
    """
    middle = float(_shifted(schedule, image_tokens))
    return math.log(middle / (1 - middle))


def _shifted(schedule: Schedule, image_tokens: int) -> float:
    # The second of two steps begins at a half, wherever the shift has moved it.
    return float(schedule.sigmas(2, image_tokens)[1])


def shares(uniform: Tensor, kind: str, schedule: Schedule, image_tokens: int) -> Tensor:
    """Uniform numbers of 0..1 [B] -> noise shares of 0..1, float32 [B].

    `uniform` leaves them; `logit-normal` is the sigmoid of a standard normal (mean 0, deviation 1:
    Esser et al.'s best); `shifted` moves that by `shift`.
    """
    if kind == "uniform":
        return uniform.float()
    logits = torch.special.ndtri(uniform.double().clamp(_EDGE, 1 - _EDGE))
    if kind == "shifted":
        logits = logits + shift(schedule, image_tokens)
    shares_: Tensor = logits.sigmoid().float()
    return shares_


def mixed(clean: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """Latents and noise [B, tokens, 4C], shares [B] -> what the model is shown."""
    return torch.lerp(clean, noise, share[:, None, None])


def losses(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each picture's velocity, float32 [B]."""
    return (velocity.float() - (noise - clean)).square().mean(dim=(1, 2))


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> tokens [B, (h/2)(w/2), 4C]: `dermaflux.flow.pack` in torch."""
    batch, channels, h, w = latents.shape
    patches = latents.reshape(batch, channels, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (h // 2) * (w // 2), channels * 4)
