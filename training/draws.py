"""Which pictures a step shows, with what chance and weight, and how they are mixed.

Every step draws from random numbers of its own, made of the run's seed and the step's number: a run
that goes on draws what it would have drawn, and processes that share a batch draw the same.

    >>> draws = Draws(samples, recipe)
    >>> draws.rows(step=7)                       # int64 [batch]
"""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from dermaflux.prompt import LABELS
from training.data import Sample
from training.heads import Mixed
from training.recipe import Recipe

Kind = TypeVar("Kind")

_BENIGN_ONLY = 0.3  # how much less a group counts whose camera never saw a malignant lesion

ROWS: Final = 0
VIEWS: Final = 1
MIXES: Final = 2
LAYERS: Final = 3
"""What random numbers are for."""


def random(seed: int, *key: int) -> Generator:
    """Random numbers of a seed and a key."""
    return torch.Generator().manual_seed(number(seed, *key))


def number(seed: int, *key: int) -> int:
    """A seed of a seed and a key."""
    return int(np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0] >> 1)


def draw_weights(samples: list[Sample]) -> Tensor:
    """float64 [N]: a group (source, confirmed, label) is drawn by the square root of its size.

    Full balance would show the few consensus images hundreds of times; the root is the usual
    middle. Groups in which all are benign (follow-up, consensus) come from cameras of their own, so
    they count less: they teach the camera. Half of all draws are malignant.
    """
    groups = [(s.source, s.confirmed, str(s.lesion.label)) for s in samples]
    sizes = _counted(groups)
    mixed = {group[:2] for group in sizes if group[2] == "malignant"}
    mass = {g: n**0.5 * (1.0 if g[:2] in mixed else _BENIGN_ONLY) for g, n in sizes.items()}
    labels = {label: sum(m for g, m in mass.items() if g[2] == label) for label in LABELS}
    return torch.tensor([mass[g] / sizes[g] / labels[g[2]] for g in groups], dtype=torch.float64)


def label_weights(samples: list[Sample]) -> Tensor:
    """float64 [N]: half of all draws are malignant, and pictures of a label are alike."""
    labels = [str(sample.lesion.label) for sample in samples]
    sizes = _counted(labels)
    return torch.tensor([1 / sizes[label] for label in labels], dtype=torch.float64)


def class_weights(samples: list[Sample], wanted: str) -> Tensor:
    """float32 [2], the labels' weights in the loss, as `Recipe.class_weights` says."""
    if wanted == "none":
        return torch.ones(len(LABELS))
    if wanted != "balanced":
        return torch.tensor([float(one) for one in wanted.split(",")])
    sizes = _counted([str(sample.lesion.label) for sample in samples])
    inverse: Tensor = torch.tensor([len(samples) / sizes[label] for label in LABELS])
    weights: Tensor = inverse / inverse.mean()
    return weights


class Draws:
    """The rows of `samples` that each step shows, as `recipe.sampling` says."""

    def __init__(self, samples: list[Sample], recipe: Recipe) -> None:
        self._recipe, self._count = recipe, len(samples)
        self._weights: Tensor | None = None
        if recipe.sampling != "shuffled":
            of = draw_weights if recipe.sampling == "balanced" else label_weights
            self._weights = of(samples)

    def rows(self, step: int) -> Tensor:
        """int64 [batch]."""
        recipe = self._recipe
        if self._weights is not None:
            generator = random(recipe.seed, ROWS, step)
            return torch.multinomial(
                self._weights, recipe.batch, replacement=True, generator=generator
            )
        first = step * recipe.batch
        epochs = range(first // self._count, (first + recipe.batch - 1) // self._count + 1)
        shuffled = torch.cat(
            [torch.randperm(self._count, generator=random(recipe.seed, ROWS, e)) for e in epochs]
        )
        start = first - epochs[0] * self._count
        return shuffled[start : start + recipe.batch]

    def mixed(self, step: int) -> tuple[Mixed, tuple[int, int, int, int] | None]:
        """The step's batch, and for cutmix the box (left, top, right, bottom) of the partner.

        Neighbours are partners, so that every part of a batch is mixed within itself. One share a
        batch, mixup or cutmix at even odds where both are wanted: `timm.data.Mixup` in its mode
        "batch". Sources: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899.
        """
        recipe, rows = self._recipe, self.rows(step)
        partners = rows.unflatten(0, (-1, 2)).flip(1).flatten() if len(rows) % 2 == 0 else rows
        if not recipe.mixup and not recipe.cutmix:
            return Mixed(rows, partners, 1.0), None
        draws = np.random.default_rng((recipe.seed, MIXES, step))
        cut = bool(recipe.cutmix) and (not recipe.mixup or draws.random() < 0.5)
        alpha = recipe.cutmix if cut else recipe.mixup
        share = float(draws.beta(alpha, alpha))
        if not cut:
            return Mixed(rows, partners, share), None
        side = int(recipe.size * (1 - share) ** 0.5)
        middle = draws.integers(recipe.size, size=2)
        left, top = (int(max(at - side // 2, 0)) for at in middle)
        right, bottom = (int(min(at + side // 2, recipe.size)) for at in middle)
        share = 1 - (right - left) * (bottom - top) / recipe.size**2
        return Mixed(rows, partners, share), (left, top, right, bottom)


def blended(pictures: Tensor, share: float, box: tuple[int, int, int, int] | None) -> Tensor:
    """[N, ..., S, S], each with its neighbour in it: in the box, or by 1 - `share` everywhere."""
    if share == 1:
        return pictures
    others = pictures.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if box is None:
        blend: Tensor = share * pictures + (1 - share) * others
        return blend
    left, top, right, bottom = box
    mixed = pictures.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


def _counted(values: list[Kind]) -> Counter[Kind]:
    return Counter(values)
