"""Pictures in and out: uploads decoded with suspicion, generated images written with their marks.

A generated image says in itself that it is synthetic (the IPTC digital source type, in XMP) and how
to make it again (`dermaflux.*` texts of a PNG; JPEG and WebP have no such texts, so their record
stands in the same XMP packet, as JSON). Both are metadata: any program that saves the picture anew
may drop them.

    >>> data = encode_png(pixels, pipeline.record(request))
    >>> read_marks(data)["dermaflux.seed"]
    '7'
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Mapping
from html import unescape
from typing import Any, Final, Literal
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from dermaflux.errors import ImageError

FORMATS: Final = ("JPEG", "PNG", "WEBP")
Form = Literal["png", "webp", "jpeg"]
"""What a generated picture can be written as."""
JPEG_QUALITY: Final = 90
"""Of 100, if nothing is said: above it files grow faster than errors shrink."""
MIN_SIDE: Final = 16
"""Pixels. Nothing can be said of a smaller picture; it is a spacer or a test."""

SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word for media made by a trained model."""
NOTICE: Final = "Synthetic image, not a photograph; research use"

_XMP_KEY: Final = "XML:com.adobe.xmp"
_RECORD_SPACE: Final = "urn:dermaflux:record"


def _xmp(more: str = "") -> str:
    """The packet that marks a picture, with `more` attributes; without any it never changes."""
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"{more}>
   <dc:description><rdf:Alt>
    <rdf:li xml:lang="x-default">{NOTICE}</rdf:li>
   </rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def decode_upload(data: bytes, max_pixels: int = 40_000_000) -> Image.Image:
    """An uploaded JPEG, PNG or WebP as an upright RGB picture; transparency is put over white.

    Raises:
        ImageError: another format, damaged or cut off, animated, with a side under 16 pixels or
            of more than `max_pixels`; the header is read before any pixel is.
    """
    if not data:
        raise ImageError("the picture is empty")
    # Pillow raises a dozen kinds of exception on hostile bytes, struct.error and SyntaxError among
    # them, and every one of them means the same to the person who sent the file.
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the picture has too many pixels; use at most {max_pixels}") from error
    except Exception as error:
        raise ImageError("the file is not a JPEG, PNG or WebP picture") from error
    with picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise ImageError(
                f"the picture has {width} x {height} pixels; use at most {max_pixels} in all"
            )
        if min(width, height) < MIN_SIDE:
            raise ImageError(
                f"the picture has {width} x {height} pixels; use at least {MIN_SIDE} a side"
            )
        # Phones write a JPEG with a depth or gain map as several frames (MPO): the first is it.
        if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
            raise ImageError("the picture is animated; send a single frame")
        try:
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
        except Exception as error:
            raise ImageError("the picture is damaged or cut off") from error


def encode_png(pixels: NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
    """A PNG of uint8 [height, width, 3], marked as synthetic, with `text` as `dermaflux.<key>`."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(f"dermaflux.{key}", value)
    info.add_itxt("Description", NOTICE)
    info.add_itxt(_XMP_KEY, _xmp())
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    # Fine grain repeats itself by runs at most, so deflate need not search for more.
    picture.save(stream, format="PNG", pnginfo=info, compress_level=1, compress_type=zlib.Z_RLE)
    return stream.getvalue()


def encode(
    pixels: NDArray[np.uint8],
    text: Mapping[str, str],
    form: Form = "png",
    quality: int | None = None,
) -> bytes:
    """A file of uint8 [height, width, 3] in any of the forms, marked like `encode_png`'s.

    `quality`, 1 to 100, is JPEG's (`JPEG_QUALITY` if not given) or that of a lossy WebP; without
    one a WebP is lossless. A PNG has none.
    """
    if form == "png":
        return encode_png(pixels, text)
    # ASCII, since XML has no place for some characters that a prompt may have.
    record = quoteattr(json.dumps(dict(text)))
    space = f'\n    xmlns:dermaflux="{_RECORD_SPACE}"\n    dermaflux:record={record}'
    xmp = _xmp(space).encode()
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    if form == "jpeg":
        # No subsampling: colours are what a lesion is judged by.
        picture.save(stream, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0, xmp=xmp)
    elif quality is None:
        picture.save(stream, "WEBP", lossless=True, xmp=xmp)
    else:
        picture.save(stream, "WEBP", quality=quality, xmp=xmp)
    return stream.getvalue()


def read_marks(data: bytes) -> dict[str, str]:
    """The marks of a file that `encode` wrote: `dermaflux.*`, `Description` and, where the XMP
    packet names one, `DigitalSourceType`. Empty for any other picture.

    Raises:
        ImageError: it is not a PNG, JPEG or WebP.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.load()
            texts: dict[str, Any] = {str(key): value for key, value in picture.info.items()}
    except Exception as error:
        raise ImageError("the file is not a PNG, JPEG or WebP picture") from error
    marks = {
        key: str(value)
        for key, value in texts.items()
        if key.startswith("dermaflux.") or key == "Description"
    }
    packet = texts.get(_XMP_KEY, texts.get("xmp", ""))
    packet = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else str(packet)
    record = re.search(r"""dermaflux:record=("[^"]*"|'[^']*')""", packet)
    if record:
        marks |= {f"dermaflux.{key}": text for key, text in _record(unescape(record[1][1:-1]))}
    description = re.search(r'<rdf:li xml:lang="x-default">([^<]+)</rdf:li>', packet)
    if description:
        marks.setdefault("Description", unescape(description[1]))
    found = re.search(r'Iptc4xmpExt:DigitalSourceType="([^"]+)"', packet)
    return {**marks, "DigitalSourceType": found[1]} if found else marks


def _record(text: str) -> list[tuple[str, str]]:
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [(key, str(value)) for key, value in known.items()] if isinstance(known, dict) else []


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion cuts everything above 255 to white.
        grey: NDArray[Any] = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layers = picture.convert("RGBA")
        paper = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(paper, layers).convert("RGB")
    return picture.convert("RGB")
