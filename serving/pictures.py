"""Finished images on their way out: one file, or several as a zip or as `multipart/mixed`.

Every file carries its own record and marks inside (`dermaflux.images`); what is ASCII by nature is
in headers too. The prompt, which may be of any language, is in the file alone.

    curl localhost:3000/v1/generate -H 'content-type: application/json' -o four.zip \\
        -d '{"lesion": {"label": "benign"}, "n": 4, "format": "webp"}'
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

from PIL import Image
from starlette.responses import Response

from dermaflux.decode import Pixels
from dermaflux.images import Form
from dermaflux.request import Request as Wanted

ZIP = "application/zip"
MULTIPART = "multipart/mixed"

REPRODUCTION = ("bundle", "seed", "steps", "guidance", "engine", "precision", "tier")
"""Parts of an image's record that are ASCII whatever was asked, so they can be headers. The tier
is there where steps were forecast."""

PREVIEW_SIDE = 128
"""Pixels of a preview's longer side at most: enough to see where an image goes."""
_PREVIEW_QUALITY = 70
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The zip format's first date: the same request gives the same bytes on any day."""


@dataclass(frozen=True)
class Picture:
    """A finished image as a file, with what is needed to draw it again.

    `pixels_sha256` is of the exact pixels, uint8 [height, width, 3], before any mark.
    """

    wanted: Wanted
    record: Mapping[str, str]
    prompt_tokens: int
    form: Form
    data: bytes
    pixels_sha256: str

    @property
    def name(self) -> str:
        """A file name that says which seed it is."""
        return f"dermaflux-{self.wanted.seed}.{'jpg' if self.form == 'jpeg' else self.form}"

    @property
    def media_type(self) -> str:
        """`image/png`, `image/webp` or `image/jpeg`."""
        return f"image/{self.form}"

    @property
    def headers(self) -> dict[str, str]:
        """The record as headers, as far as it is ASCII."""
        marks = {name.title(): self.record[name] for name in REPRODUCTION if name in self.record}
        return {
            **{f"X-DermaFlux-{name}": text for name, text in marks.items()},
            "X-DermaFlux-Prompt-Tokens": str(self.prompt_tokens),
            "X-DermaFlux-Pixels-SHA256": self.pixels_sha256,
        }


def preview(pixels: Pixels) -> bytes:
    """A small JPEG of an unfinished image, at most `PREVIEW_SIDE` pixels a side; without marks,
    for it is part of a reply that says what it is."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_PREVIEW_QUALITY)
    return stream.getvalue()


def reply(pictures: Sequence[Picture], accept: str) -> Response:
    """One picture as it is; several as a zip, or as `multipart/mixed` where `accept` prefers it."""
    first = pictures[0]
    headers = {**first.headers, "Cache-Control": "no-store"}
    if len(pictures) == 1:
        headers["Content-Disposition"] = f'inline; filename="{first.name}"'
        return Response(first.data, media_type=first.media_type, headers=headers)
    headers["X-DermaFlux-Images"] = str(len(pictures))
    # Of the whole reply, the seed is that of its first image.
    if prefers_multipart(accept):
        boundary = uuid4().hex
        body = b"".join(_parts(pictures, boundary))
        return Response(body, media_type=f"{MULTIPART}; boundary={boundary}", headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="dermaflux-{first.wanted.seed}.zip"'
    return Response(zipped(pictures), media_type=ZIP, headers=headers)


def zipped(pictures: Sequence[Picture]) -> bytes:
    """The files in one zip, in order and not packed again: they are packed already."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for one in pictures:
            archive.writestr(zipfile.ZipInfo(one.name, _LONG_AGO), one.data)
    return stream.getvalue()


def prefers_multipart(accept: str) -> bool:
    """Whether an `Accept` header puts `multipart/mixed` above `application/zip`."""
    wishes = dict(_wishes(accept))

    def wish(kind: str) -> float:
        ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        return next((wishes[one] for one in ranges if one in wishes), 0.0)

    return wish(MULTIPART) > wish(ZIP)


def _wishes(accept: str) -> Iterator[tuple[str, float]]:
    """Media range and weight, RFC 9110 section 12.5.1; what cannot be read weighs nothing."""
    for item in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in item.split(";"))
        weight = next((one[2:] for one in parameters if one.startswith("q=")), "1")
        try:
            yield kind, float(weight)
        except ValueError:
            yield kind, 0.0


def _parts(pictures: Sequence[Picture], boundary: str) -> Iterator[bytes]:
    for one in pictures:
        headers = {
            "Content-Type": one.media_type,
            "Content-Disposition": f'inline; filename="{one.name}"',
            "Content-Length": str(len(one.data)),
            **one.headers,
        }
        head = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        yield f"--{boundary}\r\n{head}\r\n".encode("ascii")
        yield one.data
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode("ascii")
