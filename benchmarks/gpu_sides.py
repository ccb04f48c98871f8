"""Who draws for `benchmarks.gpu`: diffusers' transformer and ours, on the same random weights.

    >>> sides = Sides(FULL, torch.device("cuda"), torch.bfloat16, backend="inductor")
    >>> sides.draw(sides.engine("fp8", guided=True), image)         # latents [1, C, h, w]
    >>> sides.draw_with_diffusers(image)

Diffusers is imported for its own rows alone: our forward needs a config and tensors. Its loop keeps
latents on the device, as its pipeline does, and adds none of the pipeline's overhead. Ours goes
through `dermaflux.denoise`, numpy at every step, as the service does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch

from benchmarks.gpu_shapes import GUIDANCE, SEED, Image, Shape
from dermaflux import flow
from dermaflux.denoise import Text, denoise
from dermaflux.engines import Engine
from dermaflux.engines.flux import Flux
from dermaflux.engines.flux_engine import FluxEngine
from dermaflux.engines.flux_fp8 import LOW
from dermaflux.engines.flux_graph import Blocks, Capture, on_cuda
from dermaflux.engines.flux_weights import fill, randomly
from dermaflux.flow import Floats

LOSSLESS: Final = "lossless"
FP8: Final = "fp8"
CACHED: Final = "cached"


class Sides:
    """Models and inputs, each made when it is first asked for."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, backend: str
    ) -> None:
        self.shape, self.device, self.dtype, self.backend = shape, device, dtype, backend
        self._weights: dict[str, Flux] = {}
        self._engines: dict[tuple[str, bool], FluxEngine] = {}

    def weights(self, tier: str) -> Flux:
        """Ours, in `dtype`, or the blocks' layers in fp8."""
        if tier not in self._weights:
            low = LOW if tier == FP8 else ()
            self._weights[tier] = randomly(
                self.shape.transformer, self.dtype, self.device, low, SEED
            )
        return self._weights[tier]

    def engine(self, tier: str, guided: bool) -> FluxEngine:
        """The engine as the product makes it; without guidance schnell's, of the same weights."""
        key = (tier, guided)
        if key not in self._engines:
            self._engines[key] = self.variant(tier, guided, Blocks(self.backend), self.capture())
        return self._engines[key]

    def variant(
        self, tier: str, guided: bool, blocks: Blocks | None, capture: Capture | None
    ) -> FluxEngine:
        """An engine of some of the techniques."""
        flux = self.weights(tier)
        flux = flux if guided else flux._replace(guidance=None)
        return FluxEngine(flux, tier, blocks=blocks, capture=capture)

    def capture(self) -> Capture | None:
        """Graphs, where there is CUDA."""
        return on_cuda() if self.device.type == "cuda" else None

    def draw(
        self, engine: Engine, image: Image, steps: int | None = None, *, forecasts: bool = False
    ) -> Floats:
        """Latents [1, C, h, w] of the image, by the loop of the product."""
        noise, text = self.inputs(image)
        return denoise(
            engine,
            self.shape.model(image),
            image.schedule,
            noise,
            text,
            steps=[steps or image.steps],
            guidance=[GUIDANCE if image.guided else None],
            forecasts=forecasts,
        )

    def step(self, engine: FluxEngine, image: Image) -> Callable[[], Floats]:
        """One forward at the first step, bound: for a profile and for comparing velocities."""
        given, timestep = self._given(image)
        tokens = given.pop("hidden_states")
        bound = engine.bind(given, timestep[None])
        asked = {"hidden_states": tokens, "timestep": timestep}
        return lambda: bound(asked)["out_hidden_states"]

    def inputs(self, image: Image) -> tuple[Floats, Text]:
        """Noise [1, C, h, w] and an encoded text: equal for all sides."""
        model = self.shape.model(image)
        noise = flow.noise(
            SEED, flow.latent_shape(image.side, image.side, model.latent_channels, model.scale)
        )
        rng = np.random.default_rng(SEED)
        width, pooled = (
            self.shape.transformer[f"{name}_dim"]
            for name in ("joint_attention", "pooled_projection")
        )
        embeddings = rng.standard_normal((1, image.text, width), dtype=np.float32)
        return noise[None], Text(embeddings, rng.standard_normal((1, pooled), dtype=np.float32))

    def draw_with_diffusers(self, image: Image, steps: int | None = None) -> Floats:
        """The same by diffusers' model, latents on the device until the end."""
        noise, _ = self.inputs(image)
        given, _ = self._given(image)
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in given.items()}
        latents = tensors.pop("hidden_states")
        fixed = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
        sigmas = image.schedule.sigmas(steps or image.steps, latents.shape[1])
        with torch.inference_mode():
            for sigma, after in zip(sigmas, sigmas[1:], strict=False):
                velocity = self._velocity(fixed, latents, float(sigma))
                latents = latents + float(after - sigma) * velocity.float()
        *_, h, w = noise.shape
        final: Floats = flow.unpack(latents.cpu().numpy(), h, w)
        return final

    def first_with_diffusers(self, image: Image) -> Floats:
        """Diffusers' velocity at the first step, [1, N, 4C]."""
        given, timestep = self._given(image)
        tensors = {
            name: torch.from_numpy(value).to(self.device, self.dtype)
            for name, value in given.items()
        }
        tokens = tensors.pop("hidden_states")
        with torch.inference_mode():
            velocity: Floats = (
                self._velocity(tensors, tokens, float(timestep[0])).float().cpu().numpy()
            )
        return velocity

    def compile_diffusers(self) -> None:
        """Regional compilation, as its documentation advises."""
        self.diffusers.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=self.backend)

    @cached_property
    def diffusers(self) -> Any:
        """Its transformer, made on the device, with the random weights of ours.

        Raises:
            ImportError: diffusers is not installed.
        """
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            model = FluxTransformer2DModel(**self.shape.transformer)
        model = model.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        for name, tensor in model.named_parameters():
            fill(name, tensor, SEED)
        return model

    def _velocity(self, fixed: dict[str, Any], latents: Any, sigma: float) -> Any:
        timestep = torch.full((1,), sigma, dtype=self.dtype, device=self.device)
        return self.diffusers(
            hidden_states=latents.to(self.dtype), timestep=timestep, return_dict=False, **fixed
        )[0]

    def _given(self, image: Image) -> tuple[dict[str, Any], Floats]:
        """Inputs of the transformer at the first step, without the timestep, and that."""
        noise, text = self.inputs(image)
        tokens = flow.pack(noise)
        *_, h, w = noise.shape
        given = {
            "hidden_states": tokens,
            "encoder_hidden_states": text.embeddings,
            "pooled_projections": text.pooled,
            "img_ids": flow.image_ids(h, w),
            "txt_ids": flow.text_ids(image.text),
        }
        if image.guided:
            given["guidance"] = np.array([GUIDANCE], np.float32)
        sigmas = image.schedule.sigmas(image.steps, tokens.shape[1])
        return given, image.schedule.timesteps(sigmas[:1])
