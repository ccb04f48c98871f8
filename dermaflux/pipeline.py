"""Requests in, images out: encode -> denoise -> decode over engines that carry numpy arrays.

The arithmetic of diffusers' `FluxPipeline` without torch. What an image looks like depends on its
own request alone: its noise comes from its own seed, its schedule from its own steps, and batches
only put neighbours together. Memory is planned before anything is loaded (`dermaflux.memory`): it
limits batches, and where the parts do not fit together they are loaded, used and freed by turns.

    >>> pipeline = Pipeline.open("bundles/mini")
    >>> request = pipeline.request("dermoscopic image of a benign lesion, nevus", seed=7)
    >>> (pixels,) = pipeline.generate([request])    # uint8 [height, width, 3]

The command is `python -m dermaflux generate`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermaflux import flow, tiers
from dermaflux.bundle import GENERATOR_PARTS, Bundle, Defaults, Limits, ModelSpec
from dermaflux.decode import Pixels, decode
from dermaflux.denoise import Text, denoise, stop_if
from dermaflux.engines import EAGER, Choice, Engine, load
from dermaflux.errors import RequestError
from dermaflux.flow import Floats, Schedule
from dermaflux.memory import Plan
from dermaflux.request import Request, validate
from dermaflux.residency import InTurns, opened, planned
from dermaflux.tiers import Tier
from dermaflux.tokens import Tokens

__all__ = ["Pipeline", "Progress", "Request", "Text"]


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
    record of an image, `choices` why those engines, `plan` what fits in memory together, and `tier`
    what was given up for speed (`dermaflux.tiers`).
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
        plan: Plan | None = None,
        tier: Tier | None = None,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.limits = limits
        self.defaults = defaults
        self.tokenizers = tokenizers
        self.engines = engines
        self.choices = dict(choices or {})
        self.plan = plan
        self.tier = tier
        self._origin = dict(origin or {})

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        engine: str | None = None,
        precision: str | None = None,
        tier: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        device: str | None = None,
        compile: bool = False,
        in_turns: bool | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Pipeline:
        """A pipeline over a bundle; without `engine`, `precision` and `tier`, the best there is.

        `engine="eager"` runs the weights of `checkpoint` with the bundle's settings, on torch's
        `device`, with torch.compile if `compile`; as diffusers does, or with a `tier` by our own
        forward. `in_turns` forces that parts stay in memory
        together (False) or take turns (True), whatever the plan says; it is made for an image of
        `height` x `width`, the bundle's default if not given, and so is what engines prepare.

        Raises:
            BundleError: the bundle cannot be opened.
            EngineError: an engine cannot be had, the parts do not fit in memory, or engine or
                precision contradict the tier.
        """
        chosen = None if tier is None else tiers.tier(tier)
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        weights = None if checkpoint is None else Path(checkpoint)
        choices, plan = planned(
            bundle,
            engine,
            precision,
            device=device,
            in_turns=in_turns,
            height=height,
            width=width,
            tier=chosen,
        )

        first = (height or bundle.defaults.height, width or bundle.defaults.width)

        def make(part: str) -> Engine:
            return load(
                bundle,
                choices[part],
                checkpoint=weights,
                threads=threads,
                compile=compile,
                fast=chosen is not None,
                size=first,
            )

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
            opened(make, plan),
            {"bundle": bundle.id, "model": bundle.name, "wording": bundle.wording},
            choices,
            plan,
            chosen,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        precision: str | None = None,
        device: str = "cpu",
        compile: bool = False,
        threads: int | None = None,
        tier: str | None = None,
    ) -> Pipeline:
        """A pipeline over the eager engine: the reference that exports are compared with, in fp32
        if nothing else is asked for. With a `tier` by our own forward, in the tier's precision.

        Raises:
            BundleError: it is not a Flux checkpoint.
            EngineError: torch is not installed, or has no such precision, device or tier.
        """
        chosen = None if tier is None else tiers.tier(tier)
        from dermaflux.checkpoint import Checkpoint
        from dermaflux.engines import require

        require(EAGER)
        from dermaflux.engines import eager

        checkpoint = Checkpoint.open(path)
        level = precision or "fp32" if chosen is None else chosen.of_torch(device, precision)
        return cls(
            checkpoint.model,
            Schedule.from_config(checkpoint.scheduler),
            checkpoint.limits,
            checkpoint.defaults,
            eager.tokenizers(checkpoint),
            {
                part: eager.load(
                    checkpoint.path,
                    part,
                    precision=level,
                    device=device,
                    compile=compile,
                    threads=threads,
                    fast=chosen is not None,
                )
                for part in GENERATOR_PARTS
            },
            {"model": str(checkpoint.provenance["name"])},
            tier=chosen,
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

    @property
    def forecasts(self) -> bool:
        """Whether steps are forecast: pictures are near those of the full run, and not equal."""
        return self.tier is not None and self.tier.forecast

    def computing(self) -> Pipeline:
        """The same engines, and every step computed: this pipeline, unless it forecasts."""
        if not self.forecasts:
            return self
        exact = copy.copy(self)
        exact.tier = None
        return exact

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt, end token included; above `model.text_length` the rest is cut."""
        return self.tokenizers["tokenizer_2"].count(prompt)

    def record(self, request: Request) -> dict[str, str]:
        """What is needed to make the image again: request, model, bundle, engine, precision, and
        the tier where steps are forecast, which changes pixels."""
        # Not the engine, where there is a choice: to ask one that takes turns is to load it.
        choice = self.choices.get("transformer")
        engine = None if choice else self.engines["transformer"]
        values: dict[str, Any] = {
            **self._origin,
            "engine": choice.engine if choice else engine and engine.name,
            "precision": choice.precision if choice else engine and engine.precision,
            "tier": self.tier.name if self.tier is not None and self.forecasts else None,
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
            EngineError: an engine failed, or an image does not fit in memory.
        """
        with self.turn():
            return self.develop(
                self.latents(requests, noise=latents, on_step=on_step, cancelled=cancelled),
                cancelled=cancelled,
            )

    def latents(
        self,
        requests: Sequence[Request],
        *,
        noise: Sequence[NDArray[Any] | None] | None = None,
        on_step: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Floats]:
        """`generate` without its last stage: denoised latents float32 [C, h, w], one a request.

        For whoever develops them elsewhere, in another thread say, while the next are denoised.
        """
        if not requests:
            return []
        with self.turn():
            batches = list(self._batches([(one.height, one.width) for one in requests]))
            total = sum(max(requests[item].steps for item in batch) for batch in batches)
            stop_if(cancelled)
            texts = self._encode_once([request.prompt for request in requests])
            finals: dict[int, Floats] = {}
            done = 0

            def report(batch: list[int], done: int, step: int, moved: tuple[int, ...]) -> None:
                if on_step is not None:
                    on_step(Progress(done + step, total, tuple(batch[index] for index in moved)))

            for batch in batches:
                members = [requests[item] for item in batch]
                given = [None if noise is None else noise[item] for item in batch]
                start = np.stack([self.start(m, g) for m, g in zip(members, given, strict=True)])
                final = self.denoise(
                    start,
                    texts.take(batch),
                    steps=[member.steps for member in members],
                    guidance=[member.guidance for member in members],
                    on_step=partial(report, batch, done),
                    cancelled=cancelled,
                )
                finals.update(zip(batch, final, strict=True))
                done += max(member.steps for member in members)
        return [finals[item] for item in range(len(requests))]

    def develop(
        self, latents: Sequence[Floats], *, cancelled: Callable[[], bool] | None = None
    ) -> list[Pixels]:
        """Latents [C, h, w] -> images uint8 [height, width, 3], in order and in batches."""
        scale = self.model.scale
        sizes = [(one.shape[1] * scale, one.shape[2] * scale) for one in latents]
        images: dict[int, Pixels] = {}
        with self.turn():
            for batch in self._batches(sizes):
                stop_if(cancelled)
                stack = np.stack([latents[item] for item in batch])
                images.update(zip(batch, self.decode(stack), strict=True))
        return [images[item] for item in range(len(latents))]

    def turn(self) -> AbstractContextManager[Any]:
        """Held over stages that belong together, so that engines which take turns do so once."""
        return self.engines.turn if isinstance(self.engines, InTurns) else nullcontext()

    def start(self, request: Request, given: NDArray[Any] | None = None) -> Floats:
        """The noise float32 [C, h, w] that a request begins with: its seed's, or what is given.

        Raises:
            RequestError: what is given has another shape.
        """
        shape = flow.latent_shape(
            request.height, request.width, self.model.latent_channels, self.model.scale
        )
        if given is None:
            return flow.noise(request.seed, shape)
        if given.shape != shape:
            raise RequestError("latents", f"have the shape {given.shape}; use {shape}")
        return given.astype(np.float32)

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
            forecasts=self.forecasts,
            on_step=on_step,
            cancelled=cancelled,
        )

    def decode(self, latents: Floats) -> list[Pixels]:
        """Latents [B, C, h, w] -> images uint8 [height, width, 3]; see `dermaflux.decode`."""
        return decode(self.engines["vae_decoder"], self.model, latents)

    def _batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
        alike: dict[tuple[int, int], list[int]] = {}
        for item, size in enumerate(sizes):
            alike.setdefault(size, []).append(item)
        for size, items in alike.items():
            most = self.batch(*size)
            for start in range(0, len(items), most):
                yield items[start : start + most]

    def batch(self, height: int, width: int) -> int:
        """Images of a size that are drawn together at most: the bundle's limit, or what fits.

        Raises:
            EngineError: not even one fits in memory.
        """
        return self.limits.max_batch if self.plan is None else self.plan.batch(height, width)

    def _encode_once(self, prompts: Sequence[str]) -> Text:
        unique = list(dict.fromkeys(prompts))
        most = self.limits.max_batch
        parts = [self.encode(unique[i : i + most]) for i in range(0, len(unique), most)]
        row = {prompt: number for number, prompt in enumerate(unique)}
        together = Text(
            np.concatenate([text.embeddings for text in parts]),
            np.concatenate([text.pooled for text in parts]),
        )
        return together.take([row[prompt] for prompt in prompts])
