"""Images under way: requests of any size join before any step, and leave when they are done.

What a server runs where `Pipeline.generate` is a whole batch from start to end. Requests of one
size are one batch (`dermaflux.denoise.Batch`); batches of several sizes stand beside each other,
and whoever drives them gives each a step in turn. An image is the one that `Pipeline.generate`
gives for its request alone.

    >>> images = Underway(pipeline)
    >>> images.join({"a": request})
    >>> while images.keys:
    ...     for size in images.sizes:
    ...         images.step(size)
    >>> images.develop(images.finished())       # {"a": uint8 [height, width, 3]}

Where engines take turns in memory (`dermaflux.residency`), loading outweighs all else: then nobody
joins while others are on their way, who is done waits for the rest, and the turn is held meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from contextlib import ExitStack
from typing import Generic, TypeVar

import numpy as np

from dermaflux import preview
from dermaflux.decode import Pixels
from dermaflux.denoise import Batch
from dermaflux.errors import EngineError
from dermaflux.flow import Floats
from dermaflux.pipeline import Pipeline
from dermaflux.request import Request
from dermaflux.residency import InTurns
from dermaflux.texts import Texts

K = TypeVar("K", bound=Hashable)
Size = tuple[int, int]


class Underway(Generic[K]):
    """Requests on their way, by key. Belongs to one thread at a time."""

    def __init__(self, pipeline: Pipeline, texts: Texts | None = None) -> None:
        self._pipeline = pipeline
        self._texts = texts or Texts(pipeline)
        self._turns = isinstance(pipeline.engines, InTurns)
        self._turn = ExitStack()
        self._batches: dict[Size, Batch[K]] = {}
        self._size_of: dict[K, Size] = {}
        self._finished: dict[K, Floats] = {}
        self._small = True
        self.computed = 0
        """Images whose step the last `step` computed; those of the others were forecast."""

    @property
    def keys(self) -> tuple[K, ...]:
        """Images that have steps to do, in the order in which they joined."""
        return tuple(self._size_of)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Heights and widths of the batches there are; each needs its step."""
        return tuple(self._batches)

    def of(self, size: Size) -> tuple[K, ...]:
        """The images that the next step of a size moves."""
        batch = self._batches.get(size)
        return batch.keys if batch is not None else ()

    def room(self, size: Size) -> int:
        """How many more images of a size may join now, by memory.

        Raises:
            EngineError: not even one fits.
        """
        if self._turns and (self._batches or self._finished):
            return 0
        return max(0, self._pipeline.batch(*size) - len(self.of(size)))

    def join(self, wanted: Mapping[K, Request]) -> None:
        """Take requests in: their texts are encoded, their noise is drawn.

        Raises:
            EngineError: an engine failed; none has joined.
        """
        if not wanted:
            return
        if self._turns:
            self._turn.enter_context(self._pipeline.turn())
        try:
            texts = self._texts.of([request.prompt for request in wanted.values()])
            for (key, request), text in zip(wanted.items(), texts, strict=True):
                start = self._pipeline.start(request)
                batch = self._batch((request.height, request.width), start)
                batch.join(key, start, text, request.steps, request.guidance)
                self._size_of[key] = (request.height, request.width)
        except Exception:
            self.drop(wanted)
            raise

    def step(self, size: Size) -> dict[K, int]:
        """One step for the images of a size: how many each has done, by key.

        Raises:
            EngineError: the engine failed; they are where they were before.
        """
        batch = self._batches[size]
        moved = {key: batch.done(key) + 1 for key in batch.keys}
        done = batch.step()
        self.computed = batch.computed
        self._finished.update(done)
        for key in done:
            self._leave(key)
        return moved

    def drop(self, keys: Collection[K]) -> None:
        """Let images go, wherever they are; nothing where they are not here."""
        for key in keys:
            self._finished.pop(key, None)
            if key in self._size_of:
                self._batches[self._size_of[key]].drop(key)
                self._leave(key)
        self._rest()

    def finished(self) -> dict[K, Floats]:
        """Latents [C, h, w] of the images that are ready to be developed; they stay until then."""
        return {} if self._turns and self._batches else dict(self._finished)

    def develop(self, latents: Mapping[K, Floats]) -> dict[K, Pixels]:
        """Latents of images that are done -> uint8 [height, width, 3], by key; they leave.

        Raises:
            EngineError: the decoder failed, or gave numbers that are not finite.
        """
        images = dict(zip(latents, self._pipeline.develop(list(latents.values())), strict=True))
        self.drop(latents.keys())
        return images

    def previews(self, keys: Collection[K]) -> dict[K, Pixels]:
        """Small pictures of images that have done a step, by key, of one size in one go.

        Where the decoder takes no small ones they are whole, and where it fails, or engines take
        turns in memory, there are none: nobody loses an image for want of a preview.
        """
        asked = [key for key in keys if key in self._size_of]
        found: dict[K, Pixels] = {}
        for size in dict.fromkeys(self._size_of[key] for key in asked):
            alike = [key for key in asked if self._size_of[key] == size]
            clean = {key: self._batches[size].clean(key) for key in alike}
            found.update(self._decoded({k: c for k, c in clean.items() if c is not None}, size))
        return found

    def _decoded(self, clean: Mapping[K, Floats], size: Size) -> dict[K, Pixels]:
        if not clean or self._turns:
            return {}
        by = preview.factor(self._pipeline.limits, *size) if self._small else 1
        stack = np.stack([preview.smaller(latents, by) for latents in clean.values()])
        try:
            return dict(zip(clean, self._pipeline.decode(stack), strict=True))
        except EngineError:
            if by == 1:
                return {}
        # A decoder that was compiled for some sizes only; it is not asked again.
        self._small = False
        return self._decoded(clean, size)

    def _batch(self, size: Size, start: Floats) -> Batch[K]:
        if size not in self._batches:
            pipeline = self._pipeline
            self._batches[size] = Batch(
                pipeline.engines["transformer"],
                pipeline.model,
                pipeline.schedule,
                *start.shape[1:],
                forecasts=pipeline.forecasts,
            )
        return self._batches[size]

    def _leave(self, key: K) -> None:
        size = self._size_of.pop(key)
        if not self.of(size):
            # With it goes what holds the engine, so that another part may have its memory.
            self._batches.pop(size, None)

    def _rest(self) -> None:
        """Let others have their turn once nothing is on its way."""
        if not self._batches and not self._finished:
            self._turn.close()
