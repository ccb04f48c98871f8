"""The optimizers of a recipe, and the rate of each step.

>>> optimizers = optimizers_of(model, recipe)
>>> for optimizer in optimizers:
...     set_rate(optimizer, recipe.rate * factor(step, done, recipe))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay

from training.heads import Supervised
from training.recipe import Recipe


def optimizers_of(model: Supervised, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and for "muon" Muon beside it for the matrices of the blocks, at one rate.

    With a layer decay, rates fall from the last layer to the first, and biases and norms do not
    decay (`timm.optim.param_groups_layer_decay`); without one, all is one group.
    """
    groups: list[dict[str, Any]]
    if recipe.layer_decay == 1:
        groups = [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]
    else:
        vit: Any = model.vit
        groups = param_groups_layer_decay(
            vit, recipe.weight_decay, layer_decay=recipe.layer_decay,
            no_weight_decay_list=vit.no_weight_decay() if hasattr(vit, "no_weight_decay") else (),
        )  # fmt: skip
        own = {id(parameter) for parameter in vit.parameters()}
        heads = [one for one in model.parameters() if id(one) not in own]
        groups.append({"params": heads, "weight_decay": recipe.weight_decay})
    matrices = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if recipe.optimizer == "muon" and "blocks." in name and parameter.ndim == 2
    }
    rest = _only(groups, matrices, inside=False)
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=recipe.rate)]
    if chosen := _only(groups, matrices, inside=True):
        made.append(torch.optim.Muon(chosen, lr=recipe.rate, adjust_lr_fn="match_rms_adamw"))
    return made


def _only(groups: list[dict[str, Any]], chosen: set[int], *, inside: bool) -> list[dict[str, Any]]:
    kept = [
        {**group, "params": [one for one in group["params"] if (id(one) in chosen) == inside]}
        for group in groups
    ]
    return [group for group in kept if group["params"]]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the last layer; layers before it have their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def factor(step: int, done: float, recipe: Recipe) -> float:
    """What a step's rate is multiplied by, 0..1; `done` is the share of the budget that is spent.

    Cosine: Loshchilov and Hutter, arXiv 1608.03983. The trapezoid falls evenly over the last 70 %.
    """
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    if recipe.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return min(rise, (1 - done) / 0.7)
