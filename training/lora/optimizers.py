"""The optimizer of a run and its rate at every step.

>>> optimizer = make(settings, parameters)
>>> set_rate(optimizer, rate(step, settings))
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.lora.settings import Settings, SettingsError

BETAS = (0.9, 0.999)


def make(settings: Settings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused), AdamW with states of 8 bits, or Prodigy.

    8 bits are bitsandbytes' on a GPU that has it (Dettmers et al., arXiv 2110.02861), else
    torchao's. Prodigy (Mishchenko and Defazio, arXiv 2306.06101) is prodigyopt's, with the
    settings that its authors and diffusers' recipe give for diffusion models.

    Raises:
        SettingsError: the package is not installed.
    """
    on_gpu = all(parameter.device.type == "cuda" for parameter in parameters)
    require(settings, on_gpu=on_gpu)
    given: dict[str, Any] = {"lr": settings.rate, "betas": BETAS, "weight_decay": settings.decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **given)
    if settings.optimizer == "prodigy":
        from prodigyopt import Prodigy  # type: ignore[import-untyped, unused-ignore]

        return Prodigy(  # type: ignore[no-any-return, unused-ignore]
            parameters, use_bias_correction=True, safeguard_warmup=True, decouple=True, **given
        )
    if on_gpu and _installed("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit as Eight  # type: ignore[import-not-found, unused-ignore]
    else:
        from torchao.optim import AdamW8bit as Eight  # type: ignore[import-not-found, unused-ignore]
    return Eight(parameters, **given)  # type: ignore[no-any-return, unused-ignore]


def require(settings: Settings, *, on_gpu: bool) -> None:
    """Check that the optimizer's package is there, before there is anything to optimize.

    Raises:
        SettingsError: it is not installed.
    """
    package = {"prodigy": "prodigyopt", "adamw8bit": "torchao"}.get(settings.optimizer)
    if on_gpu and settings.optimizer == "adamw8bit" and _installed("bitsandbytes"):
        return
    if package is not None and not _installed(package):
        raise SettingsError(
            f"--optimizer {settings.optimizer} needs {package}; pip install {package}"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def rate(step: int, settings: Settings) -> float:
    """The learning rate of a step, counted from 0: a linear rise over `warmup` steps, then a
    cosine to 0 at `steps`, or no change."""
    rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.schedule == "constant" or step < settings.warmup:
        return settings.rate * rise
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """For all parameters; torchao keeps the rate in a tensor, so as not to be compiled anew."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
