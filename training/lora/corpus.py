"""What is trained on: pictures with their texts, the bucket each is cropped to, and its stratum.

A bucket is a height and width in pixels, multiples of the model's token; a batch holds one bucket.
A picture goes to the largest size that does not enlarge it, and there to the nearest ratio of
sides; it is scaled to cover the bucket and cropped around its centre, where lesions are.

    >>> buckets((512,), aspect=2.0, token=16)
    {512: [(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)]}
    >>> place(600, 450, buckets((512,), aspect=2.0, token=16))
    (448, 576)
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.prompt import caption
from training.lora.settings import Settings

log = logging.getLogger(__name__)

Bucket = tuple[int, int]
Buckets = dict[int, list[Bucket]]
_STEPS: Final = 8
"""Sides of buckets move by an eighth of the square's (kohya's recipes: 64 px at 512)."""
_READERS: Final = 4
_DAMAGED: Final = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises for files that are no whole pictures: a PNG's broken chunk is a SyntaxError"""


@dataclass(frozen=True)
class Item:
    """One picture. `sha256` is that of its file, `stratum` what balancing counts it under."""

    file: Path
    record: Record
    text: str
    bucket: Bucket
    stratum: tuple[str, ...]
    sha256: str


def buckets(sizes: Iterable[int], aspect: float, token: int) -> Buckets:
    """For each size all (height, width) of about `size` x `size` pixels, sides multiples of
    `token`, the larger at most `aspect` times the smaller; the square first, under its side."""
    found: Buckets = {}
    for size in sorted(set(sizes)):
        side = max(token, size // token * token)
        step = max(token, side // _STEPS // token * token)
        near = [(side, side)]
        for short in range(side - step, 0, -step):
            long = side * side // short // step * step
            if long > aspect * short:
                break
            if long > side:
                near += [(short, long), (long, short)]
        found[side] = near
    return found


def place(width: int, height: int, known: Buckets) -> Bucket:
    """The bucket of a picture: of the largest area that is not above its own (else the smallest),
    the nearest ratio of sides."""
    fitting = [side for side in known if side * side <= width * height]
    near = known[max(fitting) if fitting else min(known)]
    return min(near, key=lambda one: abs(math.log(one[1] / one[0]) - math.log(width / height)))


def read(settings: Settings, known: Buckets) -> tuple[list[Item], dict[str, str]]:
    """The items of all datasets' split, in order, and the files that are no pictures, with why.

    A record without a text has the caption of its attributes.

    Raises:
        DatasetError: a folder is no dataset, or nothing is left to train on.
    """
    rows = [
        (folder, record)
        for folder in settings.data
        for record in dataset.read(folder)
        if record.split == settings.split and _wanted(record, settings.only)
    ]
    if not rows:
        asked = f" with {', '.join(settings.only)}" if settings.only else ""
        raise DatasetError(
            f"{', '.join(map(str, settings.data))}: no picture in split {settings.split!r}{asked}"
        )
    wanted = [] if settings.balance == ("none",) else settings.balance
    broken: dict[str, str] = {}

    def item(row: tuple[Path, Record]) -> Item | None:
        folder, record = row
        file = folder / record.file_name
        try:
            with Image.open(file) as picture:
                bucket = place(*picture.size, known)
            digest = record.sha256 or sha256(file)
        except _DAMAGED as error:
            broken[str(file)] = str(error) or type(error).__name__
            return None
        text = record.text or caption(record.lesion)
        if settings.trigger:
            text = f"{settings.trigger}, {text}"
        stratum = tuple(str(getattr(record, name) or "") for name in wanted)
        return Item(file, record, text, bucket, stratum, digest)

    with ThreadPoolExecutor(_READERS) as pool:
        items = [found for found in pool.map(item, rows) if found is not None]
    if not items:
        raise DatasetError(f"none of {len(rows)} pictures can be read; first: {first(broken)}")
    return items, broken


def _wanted(record: Record, only: Sequence[str]) -> bool:
    pairs = (one.split("=", 1) for one in only)
    return all(str(getattr(record, key) or "") == word for key, word in pairs)


def first(broken: dict[str, str]) -> str:
    """One of the broken files and why, for a message."""
    name = min(broken)
    return f"{name}: {broken[name]}"


def sha256(file: Path) -> str:
    """That of a file, hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pixels(item: Item) -> NDArray[np.uint8]:
    """The picture scaled to cover its bucket (Lanczos) and cropped to it: [height, width, 3].

    Raises:
        DatasetError: it cannot be read, or is no longer the file that its record tells of.
    """
    try:
        data = item.file.read_bytes()
        if hashlib.sha256(data).hexdigest() != item.sha256:
            raise ValueError("its checksum is not that of its record; import it again")
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGB")
    except _DAMAGED as error:
        raise DatasetError(f"{item.file} cannot be read as a picture: {error}") from error
    height, width = item.bucket
    scale = max(width / picture.width, height / picture.height)
    # The part of the picture that the bucket shows, in its own pixels.
    w, h = width / scale, height / scale
    left, top = (picture.width - w) / 2, (picture.height - h) / 2
    box = (left, top, left + w, top + h)
    shown = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(shown, dtype=np.uint8)


def turned(image: NDArray[np.uint8], turns: int) -> NDArray[np.uint8]:
    """`turns` flips of [H, W, 3]: as it is, left-right, upside down, both: [turns, H, W, 3].

    A lesion has no up; flips keep the bucket, as quarter turns would not.
    """
    flips = (image, image[:, ::-1], image[::-1], image[::-1, ::-1])
    return np.stack(flips[:turns])


def digest(items: Sequence[Item]) -> str:
    """Names what is trained on: pictures, their texts, their order."""
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item.sha256}\0{item.text}\0{item.bucket}\0{item.stratum}\n".encode())
    return total.hexdigest()


def licences(items: Iterable[Item]) -> list[dict[str, str]]:
    """The distinct source, licence and attribution of the pictures, sorted."""
    names = ("source", "licence", "attribution")
    found = {tuple(str(getattr(item.record, name)) for name in names) for item in items}
    return [dict(zip(names, one, strict=True)) for one in sorted(found)]


def captioners(items: Iterable[Item]) -> list[dict[str, str]]:
    """The distinct models that wrote captions, sorted: name, licence, sha256, and kind `captions`.

    A model of a hub has no sha256; one that says no licence has `unknown`, which allows nothing.
    """
    found = set()
    for item in items:
        told = item.record.more.get("caption")
        model = told.get("model") if isinstance(told, Mapping) and item.record.text else None
        if isinstance(model, Mapping):
            name, licence = str(model.get("name") or ""), str(model.get("licence") or "unknown")
            found.add((name or "a captioner", licence, str(model.get("sha256") or "")))
    names = ("name", "licence", "sha256")
    return [{**dict(zip(names, one, strict=True)), "kind": "captions"} for one in sorted(found)]
