"""What eager torch makes of the model's own prompts: the images and cases that exports must equal.

>>> reference = Reference.make(checkpoint, PARTS, requests)
>>> reference.images[0]                    # uint8 [height, width, 3]
>>> reference.seen["transformer"][0]       # inputs and outputs of one step of one batch
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from torch import nn

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.checkpoint import Checkpoint
from dermaflux.classifier import preprocess
from dermaflux.engines import Arrays, eager
from dermaflux.errors import BundleError, RequestError
from dermaflux.flow import Schedule
from dermaflux.pipeline import Pipeline, Request
from dermaflux.prompt import LABELS
from dermaflux.request import validate
from export.parity import Case, Pixels, Recorder, thinned
from export.prompts import captions
from export.shapes import examples, sizes
from export.source import require_weights

MOST_CASES: Final = 6
"""Steps of the transformer that its graph is compared at, evenly from noise to image."""
_CHUNK: Final = 32
"""Pictures that the classifier is given at once."""


@dataclass(frozen=True)
class Picture:
    """A photograph with its label."""

    path: Path
    malignant: bool

    def image(self) -> Pixels:
        """Its pixels, [height, width, 3]."""
        with Image.open(self.path) as picture:
            return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True)
class Reference:
    """What eager torch made.

    `seen` are the cases of each part while the images were made, `sized` those of random arrays of
    other sizes. Both test a graph in fp32; int8 has ranges, so only what the model sees tests it.
    """

    seen: Mapping[str, Sequence[Case]]
    sized: Mapping[str, Sequence[Case]]
    requests: Sequence[Request]
    images: Sequence[Pixels]
    pictures: Sequence[Picture] = ()

    @classmethod
    def make(
        cls,
        checkpoint: Checkpoint,
        parts: Sequence[str],
        requests: Sequence[Request],
        pictures: Sequence[Picture] = (),
    ) -> Reference:
        """Open the parts in fp32, make the images, and run every part at its other sizes. The
        classifier looks at the photographs, or at the images where there are none.

        Raises:
            BundleError: tensors are missing from the weights.
            EngineError: weights do not fit their config.
        """
        engines = {part: eager.load(checkpoint.path, part) for part in parts}
        for part, engine in engines.items():
            assert isinstance(engine.model, nn.Module)
            require_weights(part, engine.model, checkpoint.path)
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
            if part == "classifier" and pictures:
                for start in range(0, len(pictures), _CHUNK):
                    chunk = [picture.image() for picture in pictures[start : start + _CHUNK]]
                    recorders[part].run(as_inputs(checkpoint, part, chunk))
            elif part not in GENERATOR_PARTS:
                for start in range(0, len(images), _CHUNK):
                    recorders[part].run(as_inputs(checkpoint, part, images[start : start + _CHUNK]))
        return cls(
            seen={
                # All that the classifier saw: its curve is over all pictures.
                part: list(recorder.cases)
                if part == "classifier"
                else thinned(recorder.cases, MOST_CASES)
                for part, recorder in recorders.items()
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
            pictures=pictures,
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


def read_requests(checkpoint: Checkpoint, path: Path) -> list[Request]:
    """Requests from JSON lines: `prompt`, and any other field of a request.

    Raises:
        BundleError: the file is not there, holds none, or a line that is no request.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = {"seed": number, **json.loads(line)}
            found.append(
                validate(checkpoint.defaults, checkpoint.limits, checkpoint.model, **values)
            )
        except (ValueError, TypeError, RecursionError, RequestError) as error:
            raise BundleError(f"{path}, line {number}, is no request: {error}") from error
    if not found:
        raise BundleError(f"{path} holds no requests; write one JSON object a line")
    return found


def read_pictures(folder: Path) -> list[Picture]:
    """Photographs with labels: the rows of `metadata.jsonl` or `metadata.csv` in a folder, with
    `file_name` (or `image`) and `label`; where rows have a `split`, those of the split "test".

    Raises:
        BundleError: there is no such file, a picture is missing, or a label is neither.
    """
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    try:
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines() if line]
        else:
            with table.open(encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise BundleError(
            f"{folder} is no folder of photographs with metadata.jsonl or metadata.csv: {error}"
        ) from error
    found = []
    for row in rows:
        if not isinstance(row, dict):
            raise BundleError(f"{folder}: its metadata needs objects, not {str(row)[:40]}")
        if row.get("split", "test") != "test":
            continue
        name, label = row.get("file_name") or row.get("image"), row.get("label")
        if not isinstance(name, str) or not (folder / name).is_file() or label not in LABELS:
            raise BundleError(f"{folder}: the picture {name!r} with the label {label!r} is no use")
        found.append(Picture(folder / name, label == "malignant"))
    if not found:
        raise BundleError(f"{folder} has no photographs of the split test")
    return found


def as_inputs(checkpoint: Checkpoint, part: str, images: Sequence[Pixels]) -> Arrays:
    """Images as the VAE encoder or the classifier is given them."""
    if part == "vae_encoder":
        pixels = np.stack(images).transpose(0, 3, 1, 2)
        return {"sample": np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(127.5) - 1}
    assert checkpoint.classifier is not None
    spec = checkpoint.classifier
    return {"pixel_values": np.stack([preprocess(Image.fromarray(i), spec) for i in images])}
