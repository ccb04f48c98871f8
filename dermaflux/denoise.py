"""The denoising loop: noise and text in, latents out, each item along its own schedule.

The loop cannot tell one engine from another, nor a full batch from one whose neighbours have left.

    >>> denoise(engine, model, schedule, latents, text, steps=[20, 4], guidance=[3.5, 3.5])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dermaflux import flow
from dermaflux.bundle import ModelSpec
from dermaflux.engines import Array, Arrays, Engine
from dermaflux.errors import Cancelled
from dermaflux.flow import Floats, Schedule


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `embeddings` float32 [B, text length, D], `pooled` float32 [B, P]."""

    embeddings: Floats
    pooled: Floats

    def take(self, items: Sequence[int]) -> Text:
        """The same for some items, in their order."""
        rows = list(items)
        return Text(self.embeddings[rows], self.pooled[rows])


def denoise(
    engine: Engine,
    model: ModelSpec,
    schedule: Schedule,
    latents: Floats,
    text: Text,
    *,
    steps: Sequence[int],
    guidance: Sequence[float | None],
    on_step: Callable[[int, tuple[int, ...]], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Floats:
    """Noise float32 [B, C, h, w] -> latents [B, C, h, w], with the transformer's engine.

    `steps` and `guidance` are per item; an item that has done its steps leaves the batch.
    `on_step` gets the number of the step, from 1, and the items that it moved. `cancelled` is
    asked before every step.

    Raises:
        Cancelled: the caller asked to stop.
        EngineError: the engine failed.
    """
    _, _, h, w = latents.shape
    tokens = flow.pack(latents)
    schedules = [schedule.sigmas(count, tokens.shape[1]) for count in steps]
    active: list[int] = []
    velocity_of: Callable[[Arrays], dict[str, Array]] | None = None
    for step in range(max(steps)):
        stop_if(cancelled)
        moving = [item for item, count in enumerate(steps) if step < count]
        if velocity_of is None or moving != active:
            active = moving
            constant = {
                "encoder_hidden_states": text.embeddings[active],
                "pooled_projections": text.pooled[active],
                "img_ids": flow.image_ids(h, w),
                "txt_ids": flow.text_ids(text.embeddings.shape[1]),
            }
            if model.guidance_embeds:
                constant["guidance"] = np.array([guidance[i] for i in active], dtype=np.float32)
            velocity_of = engine.bind(constant)
        sigma = np.array([schedules[item][step] for item in active], dtype=np.float32)
        after = np.array([schedules[item][step + 1] for item in active], dtype=np.float32)
        current = tokens[active]
        velocity = velocity_of({"hidden_states": current, "timestep": schedule.timesteps(sigma)})
        tokens[active] = flow.euler_step(current, velocity["out_hidden_states"], sigma, after)
        if on_step is not None:
            on_step(step + 1, tuple(active))
    return flow.unpack(tokens, h, w)


def stop_if(cancelled: Callable[[], bool] | None) -> None:
    """Raise `Cancelled` where the caller asks to stop."""
    if cancelled is not None and cancelled():
        raise Cancelled("the generation was cancelled")
