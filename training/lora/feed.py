"""A step's pictures as tensors: clean latents, noise, shares, texts, for some places of its batch.

>>> feed = Feed(settings, base, data, device)
>>> shown = feed.at(step, batch, range(0, 2))
>>> velocity = model(shown.noisy, shown.share, grid=shown.grid, **shown.text)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dermaflux.flow import Schedule
from training.lora import encode, objective
from training.lora.base import Base
from training.lora.draws import Batch, noise
from training.lora.prepare import Prepared
from training.lora.settings import Settings
from training.lora.trainee import Grid


@dataclass(frozen=True)
class Shown:
    """`clean`, `noise` and `noisy` are [B, tokens, 4C], `share` [B]; `text` are the arguments that
    `Trainee.forward` takes for it."""

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    share: Tensor
    grid: Grid
    text: dict[str, Any]


class Feed:
    """Reads the caches; draws depend on the seed, the step and the place in the batch alone."""

    def __init__(
        self, settings: Settings, base: Base, data: Prepared, device: torch.device
    ) -> None:
        self._settings, self._data, self._device = settings, data, device
        self._model = base.checkpoint.model
        self._schedule = Schedule.from_config(base.checkpoint.scheduler)

    def at(self, step: int, batch: Batch, places: range) -> Shown:
        """What one forward is shown of a step's batch."""
        scale, kind = self._model.scale, self._settings.timesteps
        grid = (batch.bucket[0] // scale, batch.bucket[1] // scale)
        shape = (grid[0] * grid[1] // 4, 4 * self._model.latent_channels)
        uniform = torch.from_numpy(batch.uniform[places.start : places.stop])
        share = objective.shares(uniform, kind, self._schedule, shape[0]).to(self._device)
        drawn = [torch.from_numpy(noise(self._settings.seed, step, p, shape)) for p in places]
        mess = torch.stack(drawn).to(self._device)
        clean = torch.stack([self._latents(batch, place) for place in places]).to(self._device)
        noisy = objective.mixed(clean, mess, share)
        return Shown(clean, mess, noisy, share, grid, self._text(batch, places))

    def _latents(self, batch: Batch, place: int) -> Tensor:
        item = self._data.items[batch.items[place]]
        turns = self._data.latents.get(encode.latent_key(item, self._settings.turns))
        return objective.pack(turns[batch.turns[place]].float()[None])[0]

    def _text(self, batch: Batch, places: range) -> dict[str, Any]:
        items, store = self._data.items, self._data.texts
        texts = ["" if batch.dropped[p] else items[batch.items[p]].text for p in places]
        if store is None:
            return {"texts": texts}
        keys = [encode.text_key(text) for text in texts]
        return {
            part: torch.stack([store.get(f"{key}.{part}") for key in keys]).to(self._device)
            for part in encode.PARTS
        }
