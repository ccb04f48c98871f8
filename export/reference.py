"""What eager torch makes of the model's own prompts: the images and cases that exports must equal.

>>> reference = Reference.make(checkpoint, PARTS, requests)
>>> reference.images[0]                    # uint8 [height, width, 3]
>>> reference.cases["transformer"][0]      # inputs and outputs of one step of one batch
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
from dermaflux.tokens import Tokens
from export.parity import Case, Pixels, Recorder, thinned
from export.prompts import captions
from export.shapes import examples, sizes
from export.source import require_weights

MOST_CASES: Final = 6
"""Steps of the transformer that its graph is compared at, evenly from noise to image."""


@dataclass(frozen=True)
class Reference:
    """Eager parts by name (the modules of `cases`, still to be traced), and what they made."""

    modules: Mapping[str, nn.Module]
    cases: Mapping[str, Sequence[Case]]
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
        recorders: dict[str, Recorder] = {}
        modules: dict[str, nn.Module] = {}
        for part in parts:
            engine = eager.load(checkpoint.path, part)
            assert isinstance(engine.model, nn.Module)
            require_weights(part, engine.model, checkpoint.path)
            modules[part], recorders[part] = engine.model, Recorder(engine)
        generator = {part: recorders[part] for part in GENERATOR_PARTS}
        images = pipeline(checkpoint, eager.tokenizers(checkpoint), generator).generate(requests)
        for part in set(parts) - set(GENERATOR_PARTS):
            recorders[part].run(seen(checkpoint, part, images))
        cases = {}
        for part, recorder in recorders.items():
            recorder.cases = thinned(recorder.cases, MOST_CASES)
            for size in sizes(checkpoint):
                recorder.run(examples(checkpoint, part, size))
            cases[part] = recorder.cases
        return cls(modules, cases, requests, images)


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


def pipeline(
    checkpoint: Checkpoint,
    tokenizers: Mapping[str, Tokens],
    engines: Mapping[str, Recorder],
) -> Pipeline:
    """A pipeline with the checkpoint's settings over any engines."""
    return Pipeline(
        checkpoint.model,
        Schedule.from_config(checkpoint.scheduler),
        checkpoint.limits,
        checkpoint.defaults,
        tokenizers,
        engines,
    )


def seen(checkpoint: Checkpoint, part: str, images: Sequence[Pixels]) -> Arrays:
    """Images as the VAE encoder or the classifier is given them."""
    if part == "vae_encoder":
        pixels = np.stack(images).transpose(0, 3, 1, 2)
        return {"sample": np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(127.5) - 1}
    assert checkpoint.classifier is not None
    spec = checkpoint.classifier
    return {"pixel_values": np.stack([preprocess(Image.fromarray(i), spec) for i in images])}
