"""What is asked of the service under load: images to draw and photographs to classify.

Request n of a seed is the same in every run, so two runs ask the same. Descriptions are in the
closed vocabulary, which every caller may use. Photographs are drawn here (a blot on skin colour, in
sizes and formats as clinics have them), or are the files of a folder.

    >>> Generations("generate", seed=0, steps=(4, 20)).ask(7).body
    b'{"lesion": {"label": "malignant", ...}, "seed": 7, "steps": 20}'
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
from PIL import Image, ImageFilter

from dermaflux.errors import DatasetError
from dermaflux.prompt import VOCABULARY

Kind = Literal["generate", "stream", "classify"]
PATHS: Final[dict[Kind, str]] = {
    "generate": "/v1/generate",
    "stream": "/v1/generate/stream",
    "classify": "/v1/classify",
}
SIZES: Final = ((640, 480), (1024, 768), (600, 450), (2048, 1536), (256, 256))
"""Width and height of the drawn photographs; 600 x 450 is HAM10000's."""
TYPES: Final = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_FORMATS: Final = ("JPEG", "PNG", "JPEG", "WEBP", "JPEG", "JPEG")
"""One more than there are sizes, so that every size comes in every format."""
_SUFFIXES: Final = {
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
}  # fmt: skip
_MOST_FILES: Final = 200
"""Files of a folder that are held in memory: enough that no cache has seen them all lately."""


@dataclass(frozen=True)
class Ask:
    """One request of HTTP."""

    kind: Kind
    body: bytes
    content_type: str

    @property
    def path(self) -> str:
        return PATHS[self.kind]


class Asks(Protocol):
    """Requests by number."""

    def ask(self, number: int) -> Ask: ...


@dataclass(frozen=True)
class Generations:
    """Images of many descriptions, each of one of `steps`; sizes are the bundle's if not given.

    `more` goes into every request as it is, such as `{"n": 2}`.
    """

    kind: Kind
    seed: int
    steps: Sequence[int] = ()
    size: int | None = None
    more: tuple[tuple[str, Any], ...] = ()

    def ask(self, number: int) -> Ask:
        random = np.random.default_rng((self.seed, number))
        lesion = {
            "label": str(random.choice(VOCABULARY["label"])),
            "size": str(random.choice(VOCABULARY["size"])),
            "colors": [str(random.choice(VOCABULARY["colors"]))],
        }
        asked: dict[str, Any] = {"lesion": lesion, "seed": number}
        if self.steps:
            asked["steps"] = int(random.choice(list(self.steps)))
        if self.size is not None:
            asked |= {"width": self.size, "height": self.size}
        return Ask(self.kind, json.dumps({**asked, **dict(self.more)}).encode(), "application/json")


@dataclass(frozen=True)
class Classifications:
    """Photographs in turn."""

    photographs: Sequence[tuple[bytes, str]]

    def ask(self, number: int) -> Ask:
        return Ask("classify", *self.photographs[number % len(self.photographs)])


def drawn(count: int, seed: int) -> list[tuple[bytes, str]]:
    """Photographs that show no one, as files with their content types; no two are alike."""
    return [
        photograph((seed, number), SIZES[number % len(SIZES)], _FORMATS[number % len(_FORMATS)])
        for number in range(count)
    ]


def photograph(seed: int | tuple[int, ...], size: tuple[int, int], form: str) -> tuple[bytes, str]:
    """A dark blot on skin, softly edged and grained, of width and height `size`; its type."""
    width, height = size
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre, radius = random.uniform(0.4, 0.6, 2), random.uniform(0.1, 0.35, 2) * min(size)
    away = np.hypot((x - centre[0] * width) / radius[0], (y - centre[1] * height) / radius[1])
    blot = (1 / (1 + np.exp(6 * (away - 1))))[..., None].astype(np.float32)
    skin = random.uniform((190, 140, 120), (235, 190, 170)).astype(np.float32)
    dark = random.uniform(30, 110, 3).astype(np.float32)
    grain = 6 * random.standard_normal((height, width, 1), dtype=np.float32)
    pixels = skin + (dark - skin) * blot + grain
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    stream = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(0.7)).save(stream, form)
    return stream.getvalue(), TYPES[form]


def read(folder: Path) -> list[tuple[bytes, str]]:
    """The folder's JPEG, PNG and WebP files, the first 200 by name, with their content types.

    Raises:
        DatasetError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DatasetError(
            f"{folder} has no picture; it needs files that end in {', '.join(_SUFFIXES)}"
        )
    return [(path.read_bytes(), _SUFFIXES[path.suffix.lower()]) for path in found[:_MOST_FILES]]
