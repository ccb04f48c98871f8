"""Pictures as PNG files, written by what they are: fine grain all over.

Such rows are foretold well from their neighbours, and what is left repeats itself by no more than
runs. So every row has Paeth's filter, where a general writer tries all five, and deflate looks for
runs alone (`Z_RLE`), where it would search 32 KiB for matches. Files are no larger by it.

    >>> data = write(pixels, [("Title", "a lesion")])
    >>> data[1:4]
    b'PNG'
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_COLOURS: Final = 3
_DEPTH: Final = 8
_RGB: Final = 2
_PAETH: Final = 4
_STRIP: Final = 2**17
"""Bytes filtered at once: what is made of them on the way stays in a core's cache."""


def write(pixels: Bytes, texts: Iterable[tuple[str, str]] = ()) -> bytes:
    """A PNG of uint8 [height, width, 3], with `texts` as international text (iTXt), in order.

    Source: PNG, third edition (W3C, 2025). Keywords are Latin-1 of 1 to 79 characters.
    """
    height, width, colours = pixels.shape
    assert colours == _COLOURS
    assert pixels.dtype == np.uint8
    header = struct.pack(">IIBBBBB", width, height, _DEPTH, _RGB, 0, 0, 0)
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    packed = [deflate.compress(rows.data) for rows in _filtered(pixels)]
    return b"".join(
        (
            _SIGNATURE,
            _chunk(b"IHDR", header),
            *(_chunk(b"iTXt", _text(key, value)) for key, value in texts),
            _chunk(b"IDAT", b"".join((*packed, deflate.flush()))),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(data)), kind, data, struct.pack(">I", check)))


def _text(key: str, value: str) -> bytes:
    """Not compressed, of no language."""
    return b"".join((key.encode("latin-1"), b"\0\0\0\0\0", value.encode()))


def _filtered(pixels: Bytes) -> Iterator[Bytes]:
    """Rows less what Paeth foretells of them, the filter's number before each; in strips."""
    height, width, _ = pixels.shape
    size = width * _COLOURS
    step = max(1, _STRIP // size)
    # A row of noughts above, and a pixel of noughts to the left.
    known = np.zeros((step + 1, size + _COLOURS), np.uint8)
    for start in range(0, height, step):
        rows = pixels[start : start + step].reshape(-1, size)
        count = len(rows)
        known[1 : count + 1, _COLOURS:] = rows
        made = np.empty((count, 1 + size), np.uint8)
        made[:, 0] = _PAETH
        found = _paeth(
            known[1 : count + 1, :-_COLOURS], known[:count, _COLOURS:], known[:count, :-_COLOURS]
        )
        np.subtract(rows, found, out=made[:, 1:])
        known[0] = known[count]
        yield made


def _paeth(left: Bytes, above: Bytes, corner: Bytes) -> Bytes:
    """Of three neighbours the nearest to left + above - corner; of equals the first named.

    Choices are products with 0 and 1, in bytes that may pass 255 on the way and come back: numpy
    multiplies faster than it chooses.
    """
    found, other, least = left.copy(), above.copy(), corner.copy()
    by_left = np.subtract(other, least, dtype=np.int16)
    by_above = np.subtract(found, least, dtype=np.int16)
    by_corner = by_left + by_above
    for distance in (by_left, by_above, by_corner):
        np.abs(distance, out=distance)
    other -= least
    other *= by_above <= by_corner
    other += least
    np.minimum(by_above, by_corner, out=by_above)
    found -= other
    found *= by_left <= by_above
    found += other
    return found
