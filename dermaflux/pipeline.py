"""Requests in, images out: encode -> denoise -> decode over engines that carry numpy arrays.

The arithmetic of diffusers' `FluxPipeline` without torch. What an image looks like depends on its
own request alone: its noise comes from its own seed, its schedule from its own steps, and batches
only put neighbours together.

    >>> pipeline = Pipeline.open("bundles/mini")
    >>> request = pipeline.request("dermoscopic image of a benign lesion, nevus", seed=7)
    >>> (pixels,) = pipeline.generate([request])    # uint8 [height, width, 3]

The command is `python -m dermaflux generate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermaflux import flow
from dermaflux.bundle import GENERATOR_PARTS, Bundle, Defaults, Limits, ModelSpec
from dermaflux.denoise import Text, denoise, stop_if
from dermaflux.engines import EAGER, Choice, Engine, choose, load
from dermaflux.errors import EngineError, RequestError
from dermaflux.flow import Floats, Schedule
from dermaflux.request import Request, validate
from dermaflux.tokens import Tokens

__all__ = ["Pipeline", "Progress", "Request", "Text"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Progress:
    """After a step: `step` of `steps` of the whole call; `items` are the requests it moved."""

    step: int
    steps: int
    items: tuple[int, ...]


class Pipeline:
    """Text to image over one engine per part. Safe to use from several threads at once.

    `engines` has the parts text_encoder, text_encoder_2, transformer and vae_decoder;
    `tokenizers` has tokenizer (for text_encoder) and tokenizer_2; `origin` says what runs, for the
    record of an image, and `choices` why those engines.
    """

    def __init__(
        self,
        model: ModelSpec,
        schedule: Schedule,
        limits: Limits,
        defaults: Defaults,
        tokenizers: Mapping[str, Tokens],
        engines: Mapping[str, Engine],
        origin: Mapping[str, str] | None = None,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.limits = limits
        self.defaults = defaults
        self.tokenizers = tokenizers
        self.engines = engines
        self.choices = dict(choices or {})
        self._origin = dict(origin or {})

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        engine: str | None = None,
        precision: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        threads: int | None = None,
    ) -> Pipeline:
        """A pipeline over a bundle; without `engine` and `precision`, the best that is there.

        `engine="eager"` runs the weights of `checkpoint` with the bundle's settings.

        Raises:
            BundleError: the bundle cannot be opened.
            EngineError: an engine cannot be had.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        weights = None if checkpoint is None else Path(checkpoint)
        choices = {part: choose(bundle, part, engine, precision) for part in GENERATOR_PARTS}
        # An engine opens a graph mostly on one core, so the others open theirs meanwhile.
        with ThreadPoolExecutor(len(choices)) as pool:
            opening = {
                part: pool.submit(load, bundle, choice, checkpoint=weights, threads=threads)
                for part, choice in choices.items()
            }
        return cls(
            bundle.model,
            Schedule.from_config(bundle.scheduler),
            bundle.limits,
            bundle.defaults,
            {
                name: Tokens.open(bundle.file(f"{name}/tokenizer.json"), length)
                for name, length in (
                    ("tokenizer", bundle.model.clip_length),
                    ("tokenizer_2", bundle.model.text_length),
                )
            },
            {part: engine.result() for part, engine in opening.items()},
            {"bundle": bundle.id, "model": bundle.name, "wording": bundle.wording},
            choices,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        compile: bool = False,
        threads: int | None = None,
    ) -> Pipeline:
        """A pipeline over the eager engine: the reference that exports are compared with.

        Raises:
            BundleError: it is not a Flux checkpoint.
            EngineError: torch is not installed.
        """
        from dermaflux.checkpoint import Checkpoint
        from dermaflux.engines import require

        require(EAGER)
        from dermaflux.engines import eager

        checkpoint = Checkpoint.open(path)
        return cls(
            checkpoint.model,
            Schedule.from_config(checkpoint.scheduler),
            checkpoint.limits,
            checkpoint.defaults,
            eager.tokenizers(checkpoint),
            {
                part: eager.load(
                    checkpoint.path, part, device=device, compile=compile, threads=threads
                )
                for part in GENERATOR_PARTS
            },
            {"model": str(checkpoint.provenance["name"])},
        )

    def request(
        self,
        prompt: str,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Request:
        """A checked request, with defaults for what is left out and a random seed.

        Raises:
            RequestError: a value is out of range or of another type.
        """
        rules = (self.defaults, self.limits, self.model)
        return validate(*rules, prompt, seed, steps, guidance, height, width)

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt, end token included; above `model.text_length` the rest is cut."""
        return self.tokenizers["tokenizer_2"].count(prompt)

    def record(self, request: Request) -> dict[str, str]:
        """What is needed to make the image again: request, model, bundle, engine, precision."""
        transformer = self.engines["transformer"]
        values: dict[str, Any] = {
            **self._origin,
            "engine": transformer.name,
            "precision": transformer.precision,
            **vars(request),
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    def generate(
        self,
        requests: Sequence[Request],
        *,
        latents: Sequence[NDArray[Any] | None] | None = None,
        on_step: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Pixels]:
        """One image per request, uint8 [height, width, 3], in the order of the requests.

        Requests of one size share batches of up to `limits.max_batch`; an item that has done its
        steps leaves its batch. `latents` gives the noise of some items, float32 [C, h, w], instead
        of their seed's. `cancelled` is asked before every step.

        Raises:
            Cancelled: the caller asked to stop.
            RequestError: given latents have another shape.
            EngineError: an engine failed.
        """
        batches = list(self._batches(requests))
        total = sum(max(requests[item].steps for item in batch) for batch in batches)
        images: dict[int, Pixels] = {}
        done = 0

        for batch in batches:
            members = [requests[item] for item in batch]
            text = self._encode_once([member.prompt for member in members])
            given = [None if latents is None else latents[item] for item in batch]
            start = np.stack([self._start(m, g) for m, g in zip(members, given, strict=True)])

            def report(
                step: int, moved: tuple[int, ...], batch: list[int] = batch, done: int = done
            ) -> None:
                if on_step is not None:
                    items = tuple(batch[index] for index in moved)
                    on_step(Progress(done + step, total, items))

            final = self.denoise(
                start,
                text,
                steps=[member.steps for member in members],
                guidance=[member.guidance for member in members],
                on_step=report,
                cancelled=cancelled,
            )
            stop_if(cancelled)
            images.update(zip(batch, self.decode(final), strict=True))
            done += max(member.steps for member in members)
        return [images[item] for item in range(len(requests))]

    def encode(self, prompts: Sequence[str]) -> Text:
        """Both text encoders over prompts, as one batch. Flux gives them no attention mask."""
        clip = self.engines["text_encoder"].run(
            {"input_ids": self.tokenizers["tokenizer"].ids(prompts)}
        )
        t5 = self.engines["text_encoder_2"].run(
            {"input_ids": self.tokenizers["tokenizer_2"].ids(prompts)}
        )
        return Text(t5["last_hidden_state"], clip["pooler_output"])

    def denoise(
        self,
        latents: Floats,
        text: Text,
        *,
        steps: Sequence[int],
        guidance: Sequence[float | None],
        on_step: Callable[[int, tuple[int, ...]], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Floats:
        """Noise [B, C, h, w] -> latents [B, C, h, w]; see `dermaflux.denoise.denoise`."""
        return denoise(
            self.engines["transformer"],
            self.model,
            self.schedule,
            latents,
            text,
            steps=steps,
            guidance=guidance,
            on_step=on_step,
            cancelled=cancelled,
        )

    def decode(self, latents: Floats) -> list[Pixels]:
        """Latents [B, C, h, w] -> images uint8 [height, width, 3].

        Source: `FluxPipeline.__call__`, `VaeImageProcessor.postprocess`.

        Raises:
            EngineError: the decoder gave numbers that are not finite.
        """
        scaled = latents / np.float32(self.model.scaling_factor) + np.float32(
            self.model.shift_factor
        )
        engine = self.engines["vae_decoder"]
        sample = engine.run({"latent_sample": scaled})["sample"]
        if not np.isfinite(sample).all():
            raise EngineError(
                f"{engine.name} in {self.engines['transformer'].precision} gave numbers that are "
                "not finite; try another precision"
            )
        shares = np.clip(sample * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
        return list((shares * 255).round().astype(np.uint8))

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        sizes: dict[tuple[int, int], list[int]] = {}
        for item, request in enumerate(requests):
            sizes.setdefault((request.height, request.width), []).append(item)
        for items in sizes.values():
            for start in range(0, len(items), self.limits.max_batch):
                yield items[start : start + self.limits.max_batch]

    def _encode_once(self, prompts: Sequence[str]) -> Text:
        unique = list(dict.fromkeys(prompts))
        return self.encode(unique).take([unique.index(prompt) for prompt in prompts])

    def _start(self, request: Request, given: NDArray[Any] | None) -> Floats:
        shape = flow.latent_shape(
            request.height, request.width, self.model.latent_channels, self.model.scale
        )
        if given is None:
            return flow.noise(request.seed, shape)
        if given.shape != shape:
            raise RequestError("latents", f"have the shape {given.shape}; use {shape}")
        return given.astype(np.float32)
