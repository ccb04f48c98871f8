"""Engines of a few lines of numpy: for tests of everything around engines, without a model.

They keep the properties of the real ones: an item's output depends on that item alone, the prompt
steers the image, the seed varies it, and more steps converge.

    >>> Pipeline(model, Schedule(), limits, defaults, tokenizers, engines(model))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dermaflux.bundle import ModelSpec
from dermaflux.engines import Array, Arrays, Engine


@dataclass(frozen=True)
class Fake:
    """An engine that is one function of arrays."""

    function: Callable[[Arrays], dict[str, Array]]
    name: str = "fake"
    precision: str = "fp32"

    def run(self, inputs: Arrays) -> dict[str, Array]:
        return self.function(inputs)

    def bind(
        self, constant: Arrays, timesteps: Array | None = None
    ) -> Callable[[Arrays], dict[str, Array]]:
        return lambda varying: self.function({**constant, **varying})


def engines(model: ModelSpec, width: int = 8) -> dict[str, Engine]:
    """Fakes for the four parts of a generator; `width` is that of both text embeddings."""

    def embed(inputs: Arrays) -> dict[str, Array]:
        states = np.sin(inputs["input_ids"][..., None] * np.arange(1, width + 1)).astype(np.float32)
        return {"last_hidden_state": states, "pooler_output": states.mean(axis=1)}

    def velocity(inputs: Arrays) -> dict[str, Array]:
        tokens = inputs["hidden_states"]
        words = (inputs["pooled_projections"] + inputs["encoder_hidden_states"].mean(axis=1)).mean(
            1
        )
        pull = words + 0.1 * inputs.get("guidance", np.zeros(len(tokens), np.float32))
        target = np.sin(pull[:, None, None] + inputs["img_ids"].sum(axis=1)[None, :, None])
        share = 0.5 + 0.5 * inputs["timestep"][:, None, None]
        return {"out_hidden_states": (share * (tokens - target)).astype(np.float32)}

    def paint(inputs: Arrays) -> dict[str, Array]:
        colours = inputs["latent_sample"][:, :3]
        return {"sample": np.tanh(colours.repeat(model.scale, 2).repeat(model.scale, 3))}

    return {
        "text_encoder": Fake(embed),
        "text_encoder_2": Fake(embed),
        "transformer": Fake(velocity),
        "vae_decoder": Fake(paint),
    }
