"""The denoising loop: noise and text in, latents out, each item along its own schedule.

`Batch` holds items of one size that are denoised together. An item joins before any step, whatever
the others have done by then, and leaves when its own steps are done or it is dropped; its latents
are those that it gives alone, to the bit where an engine computes rows of a batch apart from each
other. With `forecasts` steps are forecast for items whose velocity can be (`dermaflux.forecast`),
and the engine gets the others alone. `denoise` is the loop over one batch that is whole from the
start. Neither can tell one engine from another.

    >>> denoise(engine, model, schedule, latents, text, steps=[20, 4], guidance=[3.5, 3.5])

    >>> batch = Batch(engine, model, schedule, h=16, w=16)
    >>> batch.join("a", noise_a, text_a, steps=20, guidance=3.5)
    >>> batch.step()                    # {}: "a" has done 1 of 20
    >>> batch.join("b", noise_b, text_b, steps=1, guidance=3.5)
    >>> batch.step()                    # {"b": latents}: "a" has done 2 of 20
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dermaflux import flow
from dermaflux.bundle import ModelSpec
from dermaflux.engines import Array, Arrays, Engine
from dermaflux.errors import Cancelled
from dermaflux.flow import Floats, Schedule
from dermaflux.forecast import Forecast

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `embeddings` float32 [B, text length, D], `pooled` float32 [B, P]."""

    embeddings: Floats
    pooled: Floats

    def take(self, items: Sequence[int]) -> Text:
        """The same for some items, in their order."""
        rows = list(items)
        return Text(self.embeddings[rows], self.pooled[rows])


@dataclass
class _Item:
    """One item on its way: tokens [T, 4C] after `done` steps, and the velocity that led there."""

    tokens: Floats
    text: Text
    sigmas: Floats
    guidance: float | None
    done: int = 0
    velocity: Floats | None = None
    forecast: Forecast | None = None


class Batch(Generic[K]):
    """Items of one latent size h x w, by key. Belongs to one thread at a time.

    The engine is told anew what stays the same over steps only when other items than before are
    computed.
    """

    def __init__(
        self,
        engine: Engine,
        model: ModelSpec,
        schedule: Schedule,
        h: int,
        w: int,
        *,
        forecasts: bool = False,
    ) -> None:
        self._engine = engine
        self._model = model
        self._schedule = schedule
        self._h, self._w = h, w
        self._items: dict[K, _Item] = {}
        self.computed = 0
        """Items whose velocity the last step computed; those of the others were forecast."""
        self._forecasts = forecasts
        self._velocity_of: Callable[[Arrays], dict[str, Array]] | None = None
        self._bound: list[K] = []

    @property
    def keys(self) -> tuple[K, ...]:
        """Items that the next step moves, in the order in which they joined."""
        return tuple(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def join(self, key: K, latents: Floats, text: Text, steps: int, guidance: float | None) -> None:
        """Take an item in: noise float32 [C, h, w], a text of one row, steps from 1 on."""
        assert key not in self._items, f"{key!r} is in the batch already"
        assert latents.shape[1:] == (self._h, self._w), "a batch is of one size"
        tokens = flow.pack(latents[None])
        sigmas = self._schedule.sigmas(steps, tokens.shape[1])
        forecast = Forecast(sigmas) if self._forecasts else None
        self._items[key] = _Item(tokens[0], text, sigmas, guidance, forecast=forecast)
        self._velocity_of = None

    def drop(self, key: K) -> None:
        """Let an item go before it is done; nothing where it is not here."""
        if self._items.pop(key, None) is not None:
            self._velocity_of = None

    def step(self) -> dict[K, Floats]:
        """One step for every item. Those that are done leave: their latents [C, h, w], by key.

        Raises:
            EngineError: the engine failed; all items are where they were before.
        """
        velocities = self._velocities()
        for key, item in self._items.items():
            velocity = velocities[key]
            sigma, after = item.sigmas[item.done : item.done + 1], item.sigmas[item.done + 1 :][:1]
            item.tokens = flow.euler_step(item.tokens[None], velocity[None], sigma, after)[0]
            item.velocity, item.done = velocity, item.done + 1
        finished = {k: item for k, item in self._items.items() if item.done + 1 == len(item.sigmas)}
        for key in finished:
            self.drop(key)
        return {key: self._unpacked(item.tokens) for key, item in finished.items()}

    def clean(self, key: K) -> Floats | None:
        """What an item's latents [C, h, w] will be as far as its last step can tell; None before.

        x0 = x - sigma * v: along a rectified flow's straight line to its end (Liu et al., 2022).
        """
        item = self._items[key]
        if item.velocity is None:
            return None
        clean: Floats = item.tokens - item.sigmas[item.done] * item.velocity
        return self._unpacked(clean)

    def done(self, key: K) -> int:
        """Steps that an item has done."""
        return self._items[key].done

    def _velocities(self) -> dict[K, Floats]:
        """The velocity of every item: forecast, or computed for all that have to be, together."""
        forecast: dict[K, Floats] = {}
        for key, item in self._items.items():
            if item.forecast is not None and (guess := item.forecast.at(item.done)) is not None:
                forecast[key] = guess
        computed = self._computed([key for key in self._items if key not in forecast])
        self.computed = len(computed)
        # Nobody has moved yet: an engine that failed changed nothing.
        for key, velocity in forecast.items():
            item = self._items[key]
            assert item.forecast is not None
            item.forecast.taken(item.done, velocity)
        for key, velocity in computed.items():
            item = self._items[key]
            if item.forecast is None:
                continue
            correction = item.forecast.computed(item.done, velocity)
            if correction is not None:
                item.tokens = item.tokens + correction
        return forecast | computed

    def _computed(self, keys: list[K]) -> dict[K, Floats]:
        if not keys:
            return {}
        items = [self._items[key] for key in keys]
        if self._velocity_of is None or keys != self._bound:
            # What held the engine lets go of it first.
            self._velocity_of = None
            self._velocity_of = self._engine.bind(self._constant(items), self._timesteps(items))
            self._bound = keys
        sigma = np.array([item.sigmas[item.done] for item in items], dtype=np.float32)
        current = np.stack([item.tokens for item in items])
        velocity = self._velocity_of(
            {"hidden_states": current, "timestep": self._schedule.timesteps(sigma)}
        )["out_hidden_states"]
        return {key: velocity[row] for row, key in enumerate(keys)}

    def _constant(self, items: Sequence[_Item]) -> dict[str, Array]:
        embeddings = np.concatenate([item.text.embeddings for item in items])
        constant: dict[str, Array] = {
            "encoder_hidden_states": embeddings,
            "pooled_projections": np.concatenate([item.text.pooled for item in items]),
            "img_ids": flow.image_ids(self._h, self._w),
            "txt_ids": flow.text_ids(embeddings.shape[1]),
        }
        if self._model.guidance_embeds:
            constant["guidance"] = np.array([item.guidance for item in items], dtype=np.float32)
        return constant

    def _timesteps(self, items: Sequence[_Item]) -> Floats:
        """What the steps to come will ask, float32 [B, K]; who is done sooner repeats its last."""
        most = max(len(item.sigmas) - 1 - item.done for item in items)
        last = [len(item.sigmas) - 2 for item in items]
        ahead = [
            [item.sigmas[min(item.done + step, end)] for step in range(most)]
            for item, end in zip(items, last, strict=True)
        ]
        # A number at a time, as in each step, so that both are equal to the bit.
        return self._schedule.timesteps(np.array(ahead, dtype=np.float32))

    def _unpacked(self, tokens: Floats) -> Floats:
        latents: Floats = flow.unpack(tokens[None], self._h, self._w)[0]
        return latents


def denoise(
    engine: Engine,
    model: ModelSpec,
    schedule: Schedule,
    latents: Floats,
    text: Text,
    *,
    steps: Sequence[int],
    guidance: Sequence[float | None],
    forecasts: bool = False,
    on_step: Callable[[int, tuple[int, ...]], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Floats:
    """Noise float32 [B, C, h, w] -> latents [B, C, h, w], with the transformer's engine.

    `steps` and `guidance` are per item; an item that has done its steps leaves the batch.
    `forecasts` has steps forecast where that is near enough; they count as steps all the same.
    `on_step` gets the number of the step, from 1, and the items that it moved. `cancelled` is
    asked before every step.

    Raises:
        Cancelled: the caller asked to stop.
        EngineError: the engine failed.
    """
    _, _, h, w = latents.shape
    batch: Batch[int] = Batch(engine, model, schedule, h, w, forecasts=forecasts)
    for item, count in enumerate(steps):
        batch.join(item, latents[item], text.take([item]), count, guidance[item])
    finals = np.empty_like(latents)
    for step in range(max(steps)):
        stop_if(cancelled)
        moving = batch.keys
        for item, final in batch.step().items():
            finals[item] = final
        if on_step is not None:
            on_step(step + 1, moving)
    return finals


def stop_if(cancelled: Callable[[], bool] | None) -> None:
    """Raise `Cancelled` where the caller asks to stop."""
    if cancelled is not None and cancelled():
        raise Cancelled("the generation was cancelled")
