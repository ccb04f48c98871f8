"""Frozen linear layers in one byte a weight: 12 GB for FLUX.1's transformer instead of 24.

Weights are float8 (E4M3, largest 448) with one scale for each output row, made whole again in the
input's type for each product, forward and backward; products stay in bf16. It needs no package and
any device. The error is that of three bits of mantissa, 2 to 3 % of a weight.

    >>> layer = Float8Linear.of(linear)
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KIND: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(KIND).max


class Float8Linear(nn.Module):
    """A frozen linear layer: [..., in] -> [..., out] in the input's type."""

    def __init__(self, stored: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = stored.shape

    @classmethod
    def of(cls, linear: nn.Linear) -> Float8Linear:
        """A linear layer, rounded to the nearest."""
        weight = linear.weight.detach().float()
        # A row of zeros has any scale.
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST
        bias = None if linear.bias is None else linear.bias.detach()
        return cls((weight / scale).to(KIND), scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        stored, scale = self.get_buffer("stored"), self.get_buffer("scale")
        bias = self._buffers["bias"]
        result: Tensor = _Product.apply(x, stored, scale)
        return result if bias is None else result + bias


class _Product(torch.autograd.Function):
    """Keeps the byte weights alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return F.linear(x, _whole(stored, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        stored, scale = ctx.saved_tensors
        return gradients[0] @ _whole(stored, scale, gradients[0].dtype), None, None


def _whole(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype) * scale.to(dtype)
