"""What eager torch makes of the model's own prompts: the images and cases that exports must equal.

>>> reference = Reference.make(checkpoint, PARTS, requests)
>>> reference.images[0]                    # uint8 [height, width, 3]
>>> reference.seen["transformer"][0]       # inputs and outputs of one step of one batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from PIL import Image
from torch import nn

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import preprocess
from dermaflux.engines import Arrays, eager
from dermaflux.flow import Schedule
from dermaflux.pipeline import Pipeline, Request
from export.parity import Case, Pixels, Recorder, thinned
from export.prompts import captions
from export.shapes import examples, sizes
from export.source import require_weights

MOST_CASES: Final = 6
"""Steps of the transformer that its graph is compared at, evenly from noise to image."""


@dataclass(frozen=True)
class Reference:
    """Eager parts, still to be traced, and what they made.

    `seen` are the cases of each part while the images were made, `sized` those of random arrays of
    other sizes. Both test a graph in fp32; int8 has ranges, so only what the model sees tests it.
    """

    modules: Mapping[str, nn.Module]
    seen: Mapping[str, Sequence[Case]]
    sized: Mapping[str, Sequence[Case]]
    requests: Sequence[Request]
    images: Sequence[Pixels]

    @classmethod
    def make(
        cls, checkpoint: Checkpoint, parts: Sequence[str], requests: Sequence[Request]
    ) -> Reference:
        """Open the parts in fp32, make the images, and run every part at its other sizes.

        Raises:
            BundleError: tensors are missing from the weights.
            EngineError: weights do not fit their config.
        """
        engines = {part: eager.load(checkpoint.path, part) for part in parts}
        modules: dict[str, nn.Module] = {}
        for part, engine in engines.items():
            assert isinstance(engine.model, nn.Module)
            require_weights(part, engine.model, checkpoint.path)
            modules[part] = engine.model
        recorders = {part: Recorder(engine) for part, engine in engines.items()}
        pipeline = Pipeline(
            checkpoint.model,
            Schedule.from_config(checkpoint.scheduler),
            checkpoint.limits,
            checkpoint.defaults,
            eager.tokenizers(checkpoint),
            {part: recorders[part] for part in GENERATOR_PARTS},
        )
        images = pipeline.generate(requests)
        for part in parts:
            if part not in GENERATOR_PARTS:
                recorders[part].run(as_inputs(checkpoint, part, images))
        return cls(
            modules=modules,
            seen={
                part: thinned(recorder.cases, MOST_CASES) for part, recorder in recorders.items()
            },
            sized={
                part: [
                    Case(inputs, engine.run(inputs))
                    for inputs in (examples(checkpoint, part, size) for size in sizes(checkpoint))
                ]
                for part, engine in engines.items()
            },
            requests=requests,
            images=images,
        )


def requests(checkpoint: Checkpoint, count: int, seed: int) -> list[Request]:
    """`count` requests with the checkpoint's defaults; equal `seed`, equal requests.

    Where the model takes guidance, every other request asks for another than the default, down to
    1 and up to twice as much: ranges and errors depend on it.
    """
    defaults = checkpoint.defaults
    first = Request("", 0, **vars(defaults))
    asked = [replace(first, prompt=text) for text in captions(count, seed)]
    if defaults.guidance is not None:
        other = np.linspace(1.0, 2 * defaults.guidance, max(count // 2, 1))
        asked[1::2] = [
            replace(request, guidance=round(float(guidance), 2))
            for request, guidance in zip(asked[1::2], other, strict=False)
        ]
    return [replace(r, seed=1_000_000 * (seed + 1) + index) for index, r in enumerate(asked)]


def as_inputs(checkpoint: Checkpoint, part: str, images: Sequence[Pixels]) -> Arrays:
    """Images as the VAE encoder or the classifier is given them."""
    if part == "vae_encoder":
        pixels = np.stack(images).transpose(0, 3, 1, 2)
        return {"sample": np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(127.5) - 1}
    assert checkpoint.classifier is not None
    spec = checkpoint.classifier
    return {"pixel_values": np.stack([preprocess(Image.fromarray(i), spec) for i in images])}
