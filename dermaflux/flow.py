"""The arithmetic of Flux in pure numpy: latent shapes, packing, ids, schedule, noise, Euler step.

Nothing here knows a model or a device: arrays in, arrays out. Every function gives what diffusers'
`FluxPipeline` and `FlowMatchEulerDiscreteScheduler` give, in the same order of float32 operations,
so that images can be compared with theirs to the last bits.

Image height and width are in pixels; latent height `h` and width `w` are in latent cells and even;
a token is a 2 x 2 patch of latent cells. `sigma` is the share of noise: 1 is noise, 0 is image.

    >>> unpack(pack(x), h, w)                        # the identity
    >>> Schedule().sigmas(steps=4, image_tokens=64)  # float32 [5], from 1 down to 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.errors import BundleError

Floats = NDArray[np.float32]

MAX_SEED: Final = 2**53 - 1
"""Largest seed: JavaScript, and every program that reads JSON as it does, keeps it exactly."""

_SCHEDULER: Final = "FlowMatchEulerDiscreteScheduler"
_UNSUPPORTED: Final = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def latent_shape(height: int, width: int, channels: int, scale: int) -> tuple[int, int, int]:
    """Shape (channels, h, w) of the latents of one image.

    `scale` is how many pixels a latent cell spans (8). Sizes are rounded down to whole tokens of
    2 x 2 cells, as `FluxPipeline.prepare_latents` does.
    """
    return channels, 2 * (height // (scale * 2)), 2 * (width // (scale * 2))


def pack(latents: Floats) -> Floats:
    """Latents [B, C, h, w] -> tokens [B, (h/2)(w/2), 4C] (`FluxPipeline._pack_latents`)."""
    batch, channels, h, w = latents.shape
    patches = latents.reshape(batch, channels, h // 2, 2, w // 2, 2)
    return patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (h // 2) * (w // 2), channels * 4)


def unpack(tokens: Floats, h: int, w: int) -> Floats:
    """Tokens [B, (h/2)(w/2), 4C] -> latents [B, C, h, w]: the inverse of `pack`."""
    batch, _, width = tokens.shape
    patches = tokens.reshape(batch, h // 2, w // 2, width // 4, 2, 2)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(batch, width // 4, h, w)


def image_ids(h: int, w: int) -> Floats:
    """Position of every image token: [(h/2)(w/2), 3], columns 0, row, column.

    Source: `FluxPipeline._prepare_latent_image_ids`.
    """
    ids = np.zeros((h // 2, w // 2, 3), dtype=np.float32)
    ids[..., 1] = np.arange(h // 2)[:, None]
    ids[..., 2] = np.arange(w // 2)[None, :]
    return ids.reshape(-1, 3)


def text_ids(length: int) -> Floats:
    """Position of every text token: [length, 3], all 0 (`FluxPipeline.encode_prompt`)."""
    return np.zeros((length, 3), dtype=np.float32)


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a checkpoint's `scheduler_config.json`; defaults are diffusers'."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read the content of `scheduler_config.json`.

        Raises:
            BundleError: another scheduler class, or an option that is on and not supported here
                (Karras, beta or exponential sigmas, inversion, stochastic sampling, new ones).
        """
        name = config.get("_class_name", _SCHEDULER)
        if name != _SCHEDULER:
            raise BundleError(f"scheduler {name} is not supported; use {_SCHEDULER}")
        known = {field.name for field in fields(cls)}
        # A newer diffusers may write options that we do not know; they matter only when on.
        for option, value in config.items():
            if option in known or option.startswith("_") or not value:
                continue
            why = "is not supported" if option in _UNSUPPORTED else "is not known"
            raise BundleError(
                f"scheduler option {option} = {value!r} {why}; turn it off in the checkpoint's "
                "scheduler/scheduler_config.json and export again"
            )
        given = {k: v for k, v in config.items() if k in known and v is not None}
        schedule = cls(**given)
        if schedule.time_shift_type not in ("exponential", "linear"):
            raise BundleError(
                f"scheduler option time_shift_type = {schedule.time_shift_type!r} is not known; "
                "use 'exponential' or 'linear'"
            )
        return schedule

    def sigmas(self, steps: int, image_tokens: int) -> Floats:
        """The noise shares of a run of `steps` steps: [steps + 1], falling, the last one 0.

        `image_tokens` matters with dynamic shifting only: larger images stay noisy for longer.
        Source: `FluxPipeline.__call__`, `calculate_shift`, `set_timesteps`.
        """
        sigmas: NDArray[Any] = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            mu = self._mu(image_tokens)
            pull = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigmas = pull / (pull + (1 / sigmas - 1) ** 1.0)
        else:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        # A single step starts at 1 and has no second point to stretch towards.
        if self.shift_terminal and steps > 1:
            noisy = 1 - sigmas
            sigmas = 1 - noisy / (noisy[-1] / (1 - self.shift_terminal))
        return np.append(sigmas, np.zeros(1)).astype(np.float32)

    def timesteps(self, sigmas: Floats) -> Floats:
        """What the transformer is told of noise shares [...]: the same numbers, 0 to 1.

        The detour over `num_train_timesteps` is diffusers', and keeps its rounding.
        """
        times = sigmas * np.float32(self.num_train_timesteps) / np.float32(1000)
        return np.asarray(times, dtype=np.float32)

    def _mu(self, image_tokens: int) -> float:
        """Source: `calculate_shift`: a line through both (sequence length, shift) points."""
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


def noise(seed: int, shape: tuple[int, ...]) -> Floats:
    """Standard normal noise of one image: float32 of `shape`, from `seed` in 0..2**53-1 alone.

    Philox4x64 (Salmon et al., 2011) keyed by the seed gives counted 64-bit words; pairs of them
    become pairs of normals by Box and Muller (1958) in float64. Not numpy's `standard_normal`:
    numpy promises that the words of a bit generator stay, but not the normals made of them.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed} is out of range; use 0 to 2**53 - 1")
    count = math.prod(shape)
    words = np.random.Philox(key=seed).random_raw(2 * math.ceil(count / 2))
    # 53 bits each, moved by half a step: never 0, so that the logarithm is finite.
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return normals[:count].astype(np.float32).reshape(shape)


def euler_step(latents: Floats, velocity: Floats, sigma: Floats, sigma_next: Floats) -> Floats:
    """One step along the velocity: latents + (sigma_next - sigma) * velocity.

    `latents` and `velocity` are [B, ...]; `sigma` and `sigma_next` are [B], so that items of one
    batch may stand at different places of different schedules.
    Source: `FlowMatchEulerDiscreteScheduler.step`.
    """
    step = (sigma_next - sigma).reshape(-1, *(1,) * (latents.ndim - 1))
    return latents + step * velocity
