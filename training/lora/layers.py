"""LoRA on linear layers: which ones, what they compute, and how they become an adapter.

A layer computes `x W' + b + (alpha / rank) (x down') up'` as peft's does. It is written as one
autograd function, since on small models LoRA costs as much as the frozen layer: products are
accumulated into their results instead of being added afterwards, nothing frozen gets a gradient,
and an input that needs none gets none. Where it takes fewer operations (many rows, a small layer,
float32), the product runs over the merged weight `W + (alpha / rank) up down`; never in lower
precision, where a small update would be rounded away.

    >>> wanted = targets(transformer, ("*.attn.*",))
    >>> layers = inject(transformer, wanted, rank=64, alpha=64.0, seed=0)
    >>> factors(layers)["transformer_blocks.0.attn.to_q"].down.shape
    torch.Size([64, 3072])

`down` begins uniform as peft begins it (Kaiming, a = sqrt 5), `up` at 0: the first forward is the
base's, to the bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.adapter import Factors
from training.lora.settings import SettingsError

BLOCKS: Final = ("transformer_blocks.", "single_transformer_blocks.")


def targets(model: nn.Module, patterns: Sequence[str], blocks: Sequence[str] = BLOCKS) -> list[str]:
    """Names of the linear layers inside a model's blocks that match any pattern.

    For FLUX.1 all are 494: 19 double blocks of 14 and 38 single ones of 6. `blocks` are the
    beginnings of the names of layers that may be adapted at all; ("",) allows every layer.

    Raises:
        SettingsError: a pattern matches no layer.
    """
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(blocks))
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise SettingsError(
                f"--targets {pattern!r} matches none of the {len(linears)} layers; they are called "
                f"{', '.join(linears[:3])}, ..."
            )
    return [name for name in linears if any(fnmatchcase(name, pattern) for pattern in patterns)]


class LoraLinear(nn.Module):
    """A frozen linear layer with an update of rank r, its factors float32.

    `down` [r, in], `up` [out, r]; input [..., in] -> [..., out] in the input's type.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.alpha = alpha
        self.scale = alpha / rank
        # Weights of 4 bits are a class of their own, whose products `base` knows.
        self.plain = type(base.weight) is nn.Parameter and base.weight.is_floating_point()
        down = torch.empty(rank, base.in_features)
        generator = torch.Generator().manual_seed(seed)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its type."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def merges(self, rows: int) -> bool:
        """Whether so many rows go through the merged weight."""
        if not self.plain or not isinstance(self.base, nn.Linear):
            return False
        weight = self.base.weight
        exact = weight.dtype == torch.float32
        return exact and _merging_pays(rows, weight.shape, self.down.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain or not isinstance(self.base, nn.Linear):
            update = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
            result: Tensor = self.base(x) + self.scale * update
            return result
        rows = x.numel() // x.shape[-1]
        weight, bias = self.base.weight, self.base.bias
        if self.merges(rows):
            merged: Tensor = _Merged.apply(x, weight, bias, self.down, self.up, self.scale)
            return merged
        apart: Tensor = _Apart.apply(x, weight, bias, self.down, self.up, self.scale)
        return apart


def _merging_pays(rows: int, shape: torch.Size, rank: int) -> bool:
    """Compares multiplications beside those of the frozen layer's own two products."""
    out, width = shape
    apart = 3 * rows * rank * (width + out)
    merged = rank * width * out + min(by_weight(rows, out, width, rank),
                                      by_factors(rows, out, width, rank))  # fmt: skip
    return merged < apart


def by_weight(rows: int, out: int, width: int, rank: int) -> int:
    """The factors' gradients through that of the whole weight."""
    return rows * out * width + 2 * rank * out * width


def by_factors(rows: int, out: int, width: int, rank: int) -> int:
    """The factors' gradients by themselves."""
    return 2 * rows * rank * (out + width)


class _Apart(torch.autograd.Function):
    """The update beside the frozen product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        low, high = down.to(x.dtype), up.to(x.dtype)
        reduced = flat @ low.t()
        result = F.linear(flat, weight, bias)
        result.addmm_(reduced, high.t(), alpha=scale)
        # The factors are saved as they are: their copies in the input's type are cheap to remake.
        ctx.save_for_backward(flat, weight, down, up, reduced)
        ctx.scale, ctx.shape = scale, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, down, up, reduced = ctx.saved_tensors
        above = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner = above @ up.to(above.dtype)
        if ctx.scale != 1:
            inner = inner * ctx.scale
        of_down = (inner.t() @ flat).to(down.dtype)
        of_up = (above.t() @ reduced).to(up.dtype)
        if ctx.scale != 1:
            of_up = of_up * ctx.scale
        below = None
        if ctx.needs_input_grad[0]:
            below = above @ weight
            below = below.addmm_(inner, down.to(above.dtype)).view(ctx.shape)
        return below, None, None, of_down, of_up, None


class _Merged(torch.autograd.Function):
    """One product over the merged weight, which is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        merged = torch.addmm(weight, up, down, alpha=scale)
        ctx.save_for_backward(flat, merged, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return F.linear(flat, merged, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, merged, down, up = ctx.saved_tensors
        above = gradients[0].reshape(-1, gradients[0].shape[-1])
        sizes = (flat.shape[0], *merged.shape, down.shape[0])
        if by_weight(*sizes) < by_factors(*sizes):
            of_merged = above.t() @ flat
            of_up, of_down = of_merged @ down.t(), up.t() @ of_merged
        else:
            of_up, of_down = above.t() @ (flat @ down.t()), (above @ up).t() @ flat
        if ctx.scale != 1:
            of_up, of_down = of_up * ctx.scale, of_down * ctx.scale
        below = (above @ merged).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return below, None, None, of_down, of_up, None


def inject(
    model: nn.Module, wanted: Sequence[str], rank: int, alpha: float, seed: int
) -> dict[str, LoraLinear]:
    """Put LoRA around layers of a model, in place, and freeze all the rest of it.

    A layer's first factor depends on `seed` and its name alone.
    """
    model.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for name in wanted:
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
        layers[name] = LoraLinear(base, rank, alpha, own)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def factors(
    layers: Mapping[str, LoraLinear], values: Mapping[str, Tensor] | None = None
) -> dict[str, Factors]:
    """The layers as an adapter has them, on the CPU; `values` in place of the parameters', under
    the names `<layer>.down` and `<layer>.up`."""
    found = parameters(layers) if values is None else values
    return {
        name: Factors(
            down=found[f"{name}.down"].detach().float().cpu().contiguous(),
            up=found[f"{name}.up"].detach().float().cpu().contiguous(),
            alpha=layer.alpha,
        )
        for name, layer in layers.items()
    }


def parameters(layers: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """All that is trained: `<layer>.down` and `<layer>.up`."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in layers.items()
        for factor in ("down", "up")
    }
