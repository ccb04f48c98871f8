"""Latents -> pixels, with the decoder's engine.

>>> decode(engine, model, latents)      # [uint8 [height, width, 3], ...]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dermaflux.bundle import ModelSpec
from dermaflux.engines import Engine
from dermaflux.errors import EngineError
from dermaflux.flow import Floats

Pixels = NDArray[np.uint8]


def decode(engine: Engine, model: ModelSpec, latents: Floats) -> list[Pixels]:
    """Latents float32 [B, C, h, w] -> images uint8 [height, width, 3].

    Source: `FluxPipeline.__call__`, `VaeImageProcessor.postprocess`.

    Raises:
        EngineError: the decoder gave numbers that are not finite.
    """
    scaled = latents / np.float32(model.scaling_factor) + np.float32(model.shift_factor)
    sample = engine.run({"latent_sample": scaled})["sample"]
    if not np.isfinite(sample).all():
        raise EngineError(
            f"the decoder on {engine.name} gave numbers that are not finite; try another precision"
        )
    return [_pixels(one) for one in sample]


def _pixels(sample: Floats) -> Pixels:
    """One picture [3, height, width] of -1 to 1. What it passes through stays in a cache: it is
    overwritten at every stage, and turned a colour at a time."""
    values = sample * np.float32(0.5)
    values += np.float32(0.5)
    np.clip(values, 0, 1, out=values)
    values *= np.float32(255)
    np.rint(values, out=values)
    pixels = np.empty((*values.shape[1:], len(values)), np.uint8)
    for colour, plane in enumerate(values):
        pixels[..., colour] = plane
    return pixels
