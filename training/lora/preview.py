"""Pictures of fixed prompts and seeds, so that a run can be watched: the package's own road, with
the model in training as the transformer.

    >>> previews = Previews(base, settings, store, device)
    >>> for prompt, image in previews.draw(trainee): ...     # uint8 [H, W, 3]
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dermaflux import flow
from dermaflux.decode import Pixels, decode
from dermaflux.denoise import Text, denoise
from dermaflux.engines import eager
from dermaflux.engines.eager import EagerEngine
from training.lora.base import Base
from training.lora.encode import text_key
from training.lora.settings import Settings
from training.lora.store import Store
from training.lora.trainee import Trainee

_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids",
           "txt_ids")  # fmt: skip


class Previews:
    """The prompts, their embeddings and the VAE's decoder, which waits on the CPU."""

    def __init__(
        self, base: Base, settings: Settings, store: Store | None, size: int, device: torch.device
    ) -> None:
        self._model, self._defaults = base.checkpoint.model, base.checkpoint.defaults
        self._schedule = flow.Schedule.from_config(base.checkpoint.scheduler)
        self._prompts, self._seed, self._size = settings.prompts, settings.seed, size
        self._store, self._device = store, device
        self._decoder = eager.load(base.checkpoint.path, "vae_decoder", torch.float32)

    def draw(self, trainee: Trainee) -> Iterator[tuple[str, Pixels]]:
        """One picture a prompt: the base's default steps and guidance, seeds from the run's on."""
        shape = flow.latent_shape(self._size, self._size, self._model.latent_channels,
                                  self._model.scale)  # fmt: skip
        engine = self._engine(trainee, (shape[1], shape[2]))
        for place, prompt in enumerate(self._prompts):
            hidden, pooled = self._text(trainee, prompt)
            (latents,) = denoise(
                engine,
                self._model,
                self._schedule,
                flow.noise(self._seed + place, shape)[None],
                Text(hidden.float().cpu().numpy(), pooled.float().cpu().numpy()),
                steps=[self._defaults.steps],
                guidance=[self._defaults.guidance],
            )
            (image,) = decode(self._decoder, self._model, latents[None])
            yield prompt, image

    def _text(self, trainee: Trainee, prompt: str) -> tuple[Tensor, Tensor]:
        if trainee.writer is not None:
            with torch.inference_mode():
                hidden, pooled = trainee.writer([prompt])
            return hidden, pooled
        assert self._store is not None
        key = text_key(prompt)
        return self._store.get(f"{key}.hidden")[None], self._store.get(f"{key}.pooled")[None]

    def _engine(self, trainee: Trainee, grid: tuple[int, int]) -> EagerEngine:
        def model(*tensors: Tensor) -> tuple[Tensor, ...]:
            noisy, hidden, pooled, share, _, _, *guidance = tensors
            told = float(guidance[0][0]) if guidance else None
            velocity = trainee(noisy, share, grid=grid, hidden=hidden, pooled=pooled, guidance=told)
            return (velocity,)

        guided = ("guidance",) if self._model.guidance_embeds else ()
        return EagerEngine(
            model=model,
            inputs=_INPUTS + guided,
            outputs=("out_hidden_states",),
            precision="fp32",
            dtype=torch.float32,
            device=self._device,
            lock=threading.Lock(),
        )


def sheet(images: list[Pixels]) -> Pixels:
    """Pictures of one size side by side."""
    return np.concatenate(images, axis=1)
