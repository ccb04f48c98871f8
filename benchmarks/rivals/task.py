"""The task that all sides are given: same prompts, same noise, same steps, guidance, text length.

    >>> task = Task.of(Bundle.open("bundles/mini"))
    >>> task.asked(3)                   # the fourth round's: prompt, noise [1, C, h, w]
    >>> task.asked(3, images=4)         # four of them, for a batch

The text length is the bundle's. diffusers' default is 512 tokens whatever the model was trained
with; on a model of 64 that is several times the work and another picture, so a comparison that
leaves it as it is measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.captions import captions
from dermaflux import flow
from dermaflux.bundle import Bundle
from dermaflux.checkpoint import Checkpoint
from dermaflux.errors import DermaFluxError
from dermaflux.flow import Floats

STAGES: Final = ("text", "denoise", "decode", "png")


@dataclass(frozen=True)
class Asked:
    """One call: `prompts` and `seeds` one an image, `noise` float32 [n, C, h, w] of those seeds,
    sizes in pixels."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    noise: Floats
    steps: int
    guidance: float | None
    height: int
    width: int
    text_length: int


@dataclass(frozen=True)
class Drawn:
    """What came of it: uint8 [n, height, width, 3], and the seconds by stage.

    `seconds` is the side's own clock, where it is another process and the way there and back is no
    work of its own.
    """

    pixels: NDArray[np.uint8]
    stages: Mapping[str, float]
    seconds: float | None = None


Draw = Callable[[Asked], Drawn]


@dataclass(frozen=True)
class Task:
    """Pictures of one size: round n asks for the same whatever side draws it."""

    shape: tuple[int, int, int]
    steps: int
    guidance: float | None
    height: int
    width: int
    text_length: int
    scale: int
    limits: tuple[int, int, int]
    """Largest steps, smallest and largest side that the bundle takes."""

    @classmethod
    def of(cls, bundle: Bundle | Checkpoint, steps: int | None = None) -> Task:
        """The defaults of a bundle or of its checkpoint; `steps` instead of its own.

        Raises:
            DermaFluxError: more steps than the bundle takes, or less than one.
        """
        defaults, model, limits = bundle.defaults, bundle.model, bundle.limits
        wanted = defaults.steps if steps is None else steps
        if not 1 <= wanted <= limits.max_steps:
            raise DermaFluxError(f"--steps {wanted} is out of range; use 1 to {limits.max_steps}")
        size = (defaults.height, defaults.width)
        return cls(
            flow.latent_shape(*size, model.latent_channels, model.scale),
            wanted,
            defaults.guidance if model.guidance_embeds else None,
            *size,
            model.text_length,
            model.scale,
            (limits.max_steps, limits.min_size, limits.max_size),
        )

    def at(self, *, steps: int | None = None, side: int | None = None) -> Task:
        """The same with other steps, or square pictures of another side in pixels."""
        changed = self if steps is None else replace(self, steps=steps)
        if side is None:
            return changed
        shape = flow.latent_shape(side, side, self.shape[0], self.scale)
        return replace(changed, height=side, width=side, shape=shape)

    def asked(self, number: int, images: int = 1) -> Asked:
        """What round `number` asks for: other prompts and seeds than every other round."""
        seeds = range(number * images, (number + 1) * images)
        return Asked(
            tuple(captions(images, seed=number)),
            tuple(seeds),
            np.stack([flow.noise(seed, self.shape) for seed in seeds]),
            self.steps, self.guidance, self.height, self.width, self.text_length,
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """For the result: what all sides were given."""
        return {
            "size": [self.height, self.width],
            "steps": self.steps,
            "guidance": self.guidance,
            "max_sequence_length": self.text_length,
            "same_noise": True,
        }
