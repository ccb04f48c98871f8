"""What a batch shows: random views of pictures and masks, and what is known of each.

Pictures are turned by any angle, cropped (often to the lesion), and lit differently; all of that is
one affine grid and one colour matrix a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dermaflux.prompt import DIAGNOSES, LABELS, STRUCTURES
from training import data
from training.classifier import Recipe

UNKNOWN: Final = -1
"""A target that is not known: no loss."""


@dataclass(frozen=True)
class Targets:
    """What is known of every sample; -1 where it is not.

    Attributes:
        label: int64 [N]. diagnosis: int64 [N]. structures: float32 [N, 5].
        mask: uint8 [N, S, S], 255 inside of the lesion, and 0 everywhere where none is known.
        masked: bool [N], whether there is a mask.
        box: float32 [N, 3], the lesion's centre (x, y, -1..1) and half side; (0, 0, 1) without.
    """

    label: Tensor
    diagnosis: Tensor
    structures: Tensor
    mask: Tensor
    masked: Tensor
    box: Tensor

    @classmethod
    def of(cls, samples: list[data.Sample], size: int) -> Targets:
        """Read the masks at `size` pixels a side; structures are known where a source has any."""
        diagnoses, masks, boxes = list(DIAGNOSES), [], []
        rated = {s.source for s in samples if s.lesion.structures}
        for sample in samples:
            mask = data.load_mask(sample, size)
            masks.append(np.zeros((size, size), bool) if mask is None else mask)
            boxes.append(_box(masks[-1]))
        return cls(
            label=torch.tensor([LABELS.index(str(s.lesion.label)) for s in samples]),
            diagnosis=torch.tensor(
                [diagnoses.index(d) if (d := s.lesion.diagnosis) else UNKNOWN for s in samples]
            ),
            structures=torch.tensor(
                [
                    [float(w in s.lesion.structures) if s.source in rated else UNKNOWN
                     for w in STRUCTURES]
                    for s in samples
                ]
            ),
            mask=torch.from_numpy(np.stack(masks).astype(np.uint8) * 255),
            masked=torch.tensor([bool(m.any()) for m in masks]),
            box=torch.tensor(boxes, dtype=torch.float32),
        )  # fmt: skip


def _box(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[float, float, float]:
    if not mask.any():
        return 0.0, 0.0, 1.0
    size = mask.shape[0]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    centre = [(axis[0] + axis[-1] + 1) / size - 1 for axis in (columns, rows)]
    half = max(axis[-1] - axis[0] + 1 for axis in (rows, columns)) / size
    return float(centre[0]), float(centre[1]), float(half)


def views(targets: Targets, rows: Tensor, recipe: Recipe) -> Tensor:
    """A random affine view of each of `rows`: theta [N, 2, 3] for `affine_grid`."""
    count = len(rows)
    side = (0.4 + 0.6 * torch.rand(count)).sqrt()
    centre = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    zoomed = targets.masked[rows] & (torch.rand(count) < recipe.zoom)
    box = targets.box[rows]
    side = torch.where(zoomed, (box[:, 2] * (1.0 + 0.8 * torch.rand(count))).clamp(0.2, 1.0), side)
    centre = torch.where(
        zoomed[:, None], box[:, :2] + 0.2 * (torch.rand(count, 2) - 0.5) * side[:, None], centre
    )
    quarter = torch.randint(4, (count,)) * (math.pi / 2)
    angle = torch.where(torch.rand(count) < 0.5, torch.rand(count) * 2 * math.pi, quarter)
    stretch = torch.exp(0.12 * (2 * torch.rand(count) - 1))
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    scale = torch.diag_embed(torch.stack([side * stretch * flip, side / stretch], 1))
    return torch.cat([turn @ scale, centre[:, :, None]], dim=2)


def lights(count: int) -> Tensor:
    """Random colour maps [N, 3, 4]: white balance, brightness, contrast and saturation."""
    gain = torch.exp(0.12 * torch.randn(count, 1, 1) + 0.06 * torch.randn(count, 3, 1))
    contrast = 1 + 0.25 * (2 * torch.rand(count, 1, 1) - 1)
    saturation = 1 + 0.3 * (2 * torch.rand(count, 1, 1) - 1)
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    matrix = gain * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey)
    return torch.cat([matrix, (0.6 * (1 - contrast)).expand(-1, 3, 1)], dim=2)


def augment(images: Tensor, masks: Tensor, theta: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S', S'] and [N, S', S'] -> pictures [N, 3, size, size] in 0..1, and masks."""
    grid = F.affine_grid(theta, [len(images), 4, size, size], align_corners=False)
    both = torch.cat([images, masks[:, None]], dim=1).float() / 255
    seen = F.grid_sample(both, grid, padding_mode="reflection", align_corners=False)
    light = lights(len(images))
    pixels = torch.einsum("nij,njhw->nihw", light[:, :, :3], seen[:, :3])
    return (pixels + light[:, :, 3:, None]).clamp(0, 1), seen[:, 3]
