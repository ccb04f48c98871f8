"""A timm classifier with heads beside its own: more to learn from every picture.

A label is one bit a picture, far too little for a network with fresh weights. So three more heads
learn beside it, on the same features, and are thrown away afterwards: where the lesion is (each
place's share of the mask), which diagnosis it has, which dermoscopic structures experts saw. They
also pull the attention to the lesion, away from the camera's traces at the border.

Losses are sums over what a process was given, divided by counts over the whole batch, so that
processes and parts of a batch add up to what one pass over all of it gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dermaflux.prompt import DIAGNOSES, STRUCTURES
from training.classifier import build
from training.recipe import Recipe, RecipeError
from training.targets import UNKNOWN, Targets


class Outputs(NamedTuple):
    """logits [N, 2], diagnoses [N, 10], structures [N, 5], mask [N, side * side]; the last three
    are empty, [N, 0], without heads of their own."""

    logits: Tensor
    diagnoses: Tensor
    structures: Tensor
    mask: Tensor


class Supervised(nn.Module):
    """A timm classifier (`vit`, whatever its kind) with the auxiliary heads on its features."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.vit = build(recipe)
        self.auxiliary = recipe.auxiliary
        features, pooled = _probed(self.vit, recipe)
        if not recipe.auxiliary:
            return
        width, self._axis = pooled, _channels(self.vit, features, recipe)
        self.mask = nn.Linear(features[self._axis], 1)
        self.diagnosis = nn.Linear(width, len(DIAGNOSES))
        self.structures = nn.Linear(width, len(STRUCTURES))

    def forward(self, images: Tensor) -> Outputs:
        """[N, 3, S, S], normalised -> what all heads say."""
        vit: Any = self.vit  # timm's own methods are not in nn.Module's type
        features = vit.forward_features(images)
        pooled = vit.forward_head(features, pre_logits=True)
        logits = vit.get_classifier()(pooled)
        if not self.auxiliary:
            none = logits[:, :0]
            return Outputs(logits, none, none, none)
        if features.ndim == 3:
            places = features[:, vit.num_prefix_tokens :]
        else:
            places = features.movedim(self._axis, -1).flatten(1, 2)
        mask = self.mask(places).squeeze(-1)
        return Outputs(logits, self.diagnosis(pooled), self.structures(pooled), mask)


@torch.no_grad()
def _probed(model: nn.Module, recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """The shape of one picture's features, and the width of what the last layer sees.

    Raises:
        RecipeError: the model cannot take the size, or has no last layer of its own, which the
            export reads features before.
    """
    vit: Any = model
    training = model.training
    model.eval()
    picture = torch.linspace(-1, 1, 3 * recipe.size**2).reshape(1, 3, recipe.size, recipe.size)
    last = vit.get_classifier()
    whole = isinstance(last, nn.Module) and getattr(last, "bias", None) is not None
    try:
        features = vit.forward_features(picture)
        if whole:
            pooled = vit.forward_head(features, pre_logits=True)
            whole = torch.allclose(last(pooled), model(picture), rtol=1e-3, atol=1e-4)
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:160]
        raise RecipeError(
            f"{recipe.architecture} cannot be run on {recipe.size} x {recipe.size} pixels "
            f'({said}); try another --size, or --model-args such as \'{{"img_size": '
            f"{recipe.size}}}', or another --model"
        ) from error
    model.train(training)
    if not whole:
        raise RecipeError(
            f"{recipe.architecture} does not end in one linear layer over its features, from which "
            "they are exported; choose another --model"
        )
    return tuple(features.shape), int(pooled.shape[1])


def _channels(model: nn.Module, features: tuple[int, ...], recipe: Recipe) -> int:
    """Which axis of the features are channels; the others are a square of places.

    Raises:
        RecipeError: they are no square.
    """
    if len(features) == 3:
        places = features[1] - int(getattr(model, "num_prefix_tokens", 0))
        if math.isqrt(max(places, 0)) ** 2 == places > 0:
            return 2
    elif len(features) == 4:
        axis = 3 if getattr(model, "output_fmt", "NCHW") == "NHWC" else 1
        sides = [side for place, side in enumerate(features) if place not in (0, axis)]
        if sides[0] == sides[1]:
            return axis
    raise RecipeError(
        f"the features of {recipe.architecture} are {list(features)}, no square of places; train "
        "it with --auxiliary off"
    )


@dataclass(frozen=True)
class Mixed:
    """A batch mixed with another order of itself: `share` of each picture is its own.

    `pictures` and `partners` are numbers of samples, [N].
    """

    pictures: Tensor
    partners: Tensor
    share: float

    @property
    def parts(self) -> list[tuple[float, Tensor]]:
        """(weight, samples) of which a batch's losses are the sum."""
        if self.share == 1:
            return [(1.0, self.pictures)]
        return [(self.share, self.pictures), (1 - self.share, self.partners)]

    def part(self, place: slice) -> Mixed:
        """Those of some pictures."""
        return Mixed(self.pictures[place], self.partners[place], self.share)


def losses(
    outputs: Outputs, targets: Targets, batch: Mixed, whole: Mixed, masks: Tensor, recipe: Recipe,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(all losses, the label's alone) of a part of a batch, as shares of the `whole` batch's.

    `masks` [N, S, S] are as the batch shows them; `weights` [2] those of the labels.
    """
    device = outputs.logits.device
    logits, diagnoses, structures, places = (output.float() for output in outputs)
    weights = weights.to(device)
    zero = logits.new_zeros(())
    label, extra = zero, zero
    for (share, rows), (_, all_rows) in zip(batch.parts, whole.parts, strict=True):
        count = weights.cpu()[targets.label[all_rows]].sum()
        label = label + share / float(count) * F.cross_entropy(
            logits, targets.label[rows].to(device), weights, reduction="sum",
            label_smoothing=recipe.label_smoothing,
        )  # fmt: skip
        if not diagnoses.shape[1]:
            continue
        known = int((targets.diagnosis[all_rows] != UNKNOWN).sum())
        extra = extra + share * recipe.diagnosis_loss / max(known, 1) * F.cross_entropy(
            diagnoses, targets.diagnosis[rows].to(device), ignore_index=UNKNOWN, reduction="sum"
        )
        wanted = targets.structures[rows].to(device)
        rated = int((targets.structures[all_rows] != UNKNOWN).sum())
        extra = (
            extra
            + share
            * recipe.structure_loss
            / max(rated, 1)
            * (
                F.binary_cross_entropy_with_logits(structures, wanted, reduction="none")
                * (wanted != UNKNOWN)
            ).sum()
        )
    if places.shape[1]:
        side = math.isqrt(places.shape[1])
        covered = F.adaptive_avg_pool2d(masks[:, None], side).flatten(1)
        both = [_masked(targets, one) for one in (batch, whole)]
        each = F.binary_cross_entropy_with_logits(places, covered, reduction="none").mean(1)
        extra = (
            extra
            + recipe.mask_loss / max(int(both[1].sum()), 1) * (each * both[0].to(device)).sum()
        )
    return label + extra, label


def _masked(targets: Targets, batch: Mixed) -> Tensor:
    """Pictures all of whose parts have a mask, [N]."""
    found = targets.masked[batch.pictures]
    return found if batch.share == 1 else found & targets.masked[batch.partners]
