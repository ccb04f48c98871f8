"""What is known of every picture that is learnt: label, diagnosis, structures, where the lesion is.

>>> Targets.of(samples, 144, Pictures()).label.shape
torch.Size([2117])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dermaflux.prompt import DIAGNOSES, LABELS, STRUCTURES
from training.data import Sample
from training.pictures import Pictures

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
    def of(cls, samples: Sequence[Sample], size: int, pictures: Pictures) -> Targets:
        """Read the masks at `size` pixels a side; structures are known where a source has any."""
        diagnoses = list(DIAGNOSES)
        masks: list[NDArray[np.bool_]] = []
        boxes: list[tuple[float, float, float]] = []
        rated = {s.source for s in samples if s.lesion.structures}
        for sample in samples:
            mask = pictures.mask(sample, size)
            masks.append(np.zeros((size, size), bool) if mask is None else mask)
            boxes.append(box_of(masks[-1]))
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
                ],
                dtype=torch.float32,
            ),
            mask=torch.from_numpy(np.stack(masks).astype(np.uint8) * 255),
            masked=torch.tensor([bool(m.any()) for m in masks]),
            box=torch.tensor(boxes, dtype=torch.float32),
        )  # fmt: skip


def box_of(mask: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Centre (x, y, -1..1) and half side of what a mask has, (0, 0, 1) of an empty one."""
    if not mask.any():
        return 0.0, 0.0, 1.0
    size = mask.shape[0]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    centre = [(axis[0] + axis[-1] + 1) / size - 1 for axis in (columns, rows)]
    half = max(axis[-1] - axis[0] + 1 for axis in (rows, columns)) / size
    return float(centre[0]), float(centre[1]), float(half)
