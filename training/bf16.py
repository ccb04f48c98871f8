"""Arithmetic in bfloat16 where it is fast.

    >>> with autocast():
    ...     loss = model(batch)

A processor without AMX or AVX-512 BF16 emulates it: a step of the embedded default's generator
takes several times as long there as in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast() -> AbstractContextManager[None]:
    """Of the CPU: matrix products in bfloat16 where that is `fast`, in float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast())
