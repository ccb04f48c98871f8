"""Products of matrices in fp8: weights scaled by row, activations by row as they come.

On CUDA one kernel (`torch._scaled_mm`) from compute capability 8.9 on; elsewhere the same numbers
multiplied in float32, which is slow and tells what fp8 does to an image. The emulation is what has
run so far.

    >>> weight, scale = quantized(layer.weight)
    >>> product(x, weight, scale, layer.bias)

Numbers are e4m3 (4 bits of exponent, 3 of mantissa; Micikevicius et al., arXiv 2209.05433), a row's
largest becomes the type's largest. By rows, since one number for a whole matrix costs more: LPIPS
.055 against .019 by blocks on FLUX.1 (TensorRT-LLM, pull request 13567).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

LOW: Final = tuple(
    f"{stream}.{layer}" for stream in ("image", "text") for layer in ("qkv", "out", "up", "down")
) + ("single.qkv_up", "single.down")
"""Kinds of layers that are in fp8: all of the blocks, 99.9 % of the work of a step. Measured with
the embedded default (`python -m benchmarks.gpu_fp8`): their errors add up as independent ones do,
each kind's about as large as its share of the work, so that leaving one out buys little."""
EDGES: Final = ("image_in", "text_in", "modulation", "out")
"""Kinds that can be, and are not. In the same measurement `image_in` alone has an error of 3.8 %,
`out` 2.7 % and `modulation` 1.7 %, beside 4.3 % of all blocks together, for 0.3 % of the work;
`text_in` has 0.2 % and, as modulation, is computed once a request."""
KINDS: Final = LOW + EDGES
NUMBERS: Final = torch.float8_e4m3fn
_LARGEST: Final = 448.0
_SMALLEST: Final = 1e-12
"""A row of zeros is divided by this."""


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> numbers in e4m3 of the same shape, and scales, float32 [...]."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp_min(_SMALLEST) / _LARGEST
    # Clamped: rounding may pass the largest by a bit, and e4m3fn has no infinity but NaN.
    return (wide / scale[..., None]).clamp(-_LARGEST, _LARGEST).to(NUMBERS), scale


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x [..., in] with weight e4m3 [out, in] and its scales float32 [out] -> [..., out]."""
    rows = x.reshape(-1, x.shape[-1])
    low, scales = quantized(rows)
    if x.is_cuda:
        y = torch._scaled_mm(
            low,
            weight.t(),
            scale_a=scales[:, None],
            scale_b=scale[None],
            bias=bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    else:
        exact = functional.linear(low.float() * scales[:, None], weight.float() * scale[:, None])
        y = (exact + bias).to(x.dtype)
    return y.reshape(*x.shape[:-1], -1)
