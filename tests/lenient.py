"""A gate that accepts every picture, but for what a test asks of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dermaflux.appearance import LENGTH
from dermaflux.density import Density
from dermaflux.intake import Intake
from dermaflux.manifest import IntakeSpec


def one_gaussian(width: int) -> Density:
    """The standard normal distribution over `width` numbers, of which the first two count."""
    steps = np.linspace(-2, 2, 5, dtype=np.float32)
    axes = np.zeros((2, width), np.float32)
    axes[0, 0] = axes[1, 1] = 1
    return Density(
        scores=steps,
        knots=np.repeat(steps[:, None], width, axis=1),
        spread=np.ones(width, np.float32),
        mean=np.zeros(width, np.float32),
        deviation=np.ones(width, np.float32),
        axes=axes,
        origin=np.zeros(2, np.float32),
        weights=np.zeros(1, np.float32),
        means=np.zeros((1, 2), np.float32),
        factors=np.eye(2, dtype=np.float32)[None],
    )


def limits(**given: Any) -> dict[str, Any]:
    """Limits that refuse nothing, but for those given."""
    return {
        "min_side": 1, "light": -1.0, "shade": 256.0, "clipped": 1.0, "contrast": -1.0,
        "sharpness": -99.0, "grain": 99.0, "appearance": -1e9, "features": -1e9,
        "textures": -1e9, **given,
    }  # fmt: skip


def lenient(features: int, /, **given: Any) -> Intake:
    """For a classifier of that many features."""
    spec = IntakeSpec(file="classifier/intake.npz", **limits(**given))
    looks = one_gaussian(LENGTH)
    return Intake(spec, looks, one_gaussian(LENGTH + features), looks, looks)
