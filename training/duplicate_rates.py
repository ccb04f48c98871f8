"""How often near-duplicates are missed, and strangers taken for them, on real pictures.

    python -m training.duplicate_rates /data/ham10000 --pictures 1000

Pictures of a dataset are altered in the ways that collections alter them, and looked for among all
of it. A miss is a copy whose original is not found. A false alarm is a pair of unaltered pictures
that `twins` finds though their groups differ; some of these are true copies under two names, so
the pairs are listed to be looked at. The last line is one JSON object.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageOps

from dermaflux import duplicates, thumbnails
from dermaflux.command import ended, option, parsed
from dermaflux.thumbnails import Index
from training import data, grouping

log = logging.getLogger(__name__)
Alter = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Settings:
    """What to measure on."""

    dataset: Path = option("a dataset's folder")
    pictures: int = option("how many are altered", 1000)
    seed: int = option("of the choice and of the crops", 0)
    threads: int = option("for reading and comparing", 2)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def _cropped(image: Image.Image, part: float, rng: np.random.Generator) -> Image.Image:
    width, height = (round(side * (1 - part)) for side in image.size)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _turned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    image = image.rotate(90 * int(rng.integers(4)), expand=True)
    return ImageOps.mirror(image) if rng.integers(2) else image


def _slanted(image: Image.Image, degrees: float) -> Image.Image:
    edge = round(0.06 * min(image.size))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    return turned.crop((edge, edge, image.width - edge, image.height - edge))


ALTERED: Final[dict[str, Alter]] = {
    "recompressed, quality 30": lambda image, rng: _jpeg(image, 30),
    "shrunk to 96 pixels": lambda image, rng: image.resize((96, 96), Image.Resampling.LANCZOS),
    "squashed 4:3": lambda image, rng: image.resize((240, 180), Image.Resampling.LANCZOS),
    "lighter by 15 %": lambda image, rng: image.point(lambda value: value * 1.15 + 10),
    "flipped and turned": _turned,
    "turned by 3 degrees": lambda image, rng: _slanted(image, 3),
    "cropped by 3 %": lambda image, rng: _cropped(image, 0.03, rng),
    "cropped by 5 %": lambda image, rng: _cropped(image, 0.05, rng),
    "cropped by 10 %": lambda image, rng: _cropped(image, 0.10, rng),
    "flipped, turned, cropped by 3 %, quality 60": lambda image, rng: _jpeg(
        _cropped(_turned(image, rng), 0.03, rng), 60
    ),
}
"""Ways in which one collection's picture differs from another's; crops lie anywhere."""


def misses(
    everything: Index, files: dict[int, Path], alter: Alter, seed: int, threads: int
) -> float:
    """The share of altered pictures (by their number in `everything`) whose original is lost."""
    rng = np.random.default_rng(seed)
    thumbs, owner = [], []
    for number, file in enumerate(files.values()):
        with Image.open(file) as image:
            for view in thumbnails.views(alter(image.convert("RGB"), rng)):
                thumbs.append(view)
                owner.append(number)
    blank = ("",) * len(files)
    altered = Index(np.stack(thumbs), np.array(owner, np.int64), blank, blank)
    found = {(one.one, one.other) for one in duplicates.twins(altered, everything, threads)}
    return sum((n, original) not in found for n, original in enumerate(files)) / len(files)


def run(settings: Settings) -> dict[str, Any]:
    """The report: misses by alteration, false alarms with their pairs.

    Raises:
        DatasetError: it is no dataset.
    """
    records = data.records(settings.dataset)
    index = grouping.index(settings.dataset, records, settings.threads).index
    rng = np.random.default_rng(settings.seed)
    count = min(settings.pictures, len(index))
    chosen = sorted(rng.choice(len(index), count, replace=False).tolist())
    files = {number: settings.dataset / index.names[number] for number in chosen}
    missed = {}
    for name, alter in ALTERED.items():
        missed[name] = round(misses(index, files, alter, settings.seed, settings.threads), 4)
        log.info("%s: %.2f %% missed", name, 100 * missed[name])
    twins = duplicates.twins(index, threads=settings.threads)
    alarms = [one for one in twins if index.groups[one.one] != index.groups[one.other]]
    return {
        "dataset": str(settings.dataset),
        "images": len(index),
        "altered": count,
        "missed": missed,
        "pairs_compared": len(index) * (len(index) - 1) // 2,
        "near_duplicates": len(twins),
        "of_other_groups": [
            [index.names[one.one], index.names[one.other], round(one.similarity, 3)]
            for one in sorted(alarms, key=lambda one: one.similarity)
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    settings = parsed(Settings, "python -m training.duplicate_rates", str(__doc__), arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> None:
        print(json.dumps(run(settings)))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
