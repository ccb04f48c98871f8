"""Hashes of all pixels that were drawn here, so that an exact copy is known whatever it is called.

One file, appended to: a SHA-256 in hex a line, 65 bytes. It holds no picture, time or prompt. A
search reads the file through: 0.02 s for a million lines that the system holds in memory.

    >>> registry = Registry(Path("/var/lib/dermaflux/marks/pixels.sha256"))
    >>> registry.add(pixel_hash(pixels))
    >>> registry.known(pixel_hash(pixels))
    True
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from dermaflux.errors import DermaFluxError

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_BLOCK: Final = 1 << 20


class RegistryError(DermaFluxError):
    """The registry cannot be written or read."""


class Known(Protocol):
    """Whoever remembers hashes of pixels: a `Registry`, or an audit log."""

    def known(self, sha256: str) -> bool:
        """Whether pixels of this hash were drawn here."""
        ...


def pixel_hash(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 in hex of uint8 [height, width, 3] as it lies in memory, row by row."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


class Registry:
    """A file of hashes; several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, *hashes: str) -> None:
        """Append; on the disk when this returns.

        Raises:
            RegistryError: the file takes no more.
        """
        assert all(_HASH.fullmatch(one) for one in hashes), hashes
        # In front too: a line that a full disk cut off is ended, not added to.
        data = "".join(f"\n{one}" for one in hashes).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(28, "no space left")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RegistryError(
                f"{self.path} takes no more hashes ({error.strerror}); make room, or make it "
                "writable for this user"
            ) from error

    def known(self, sha256: str) -> bool:
        """Whether this hash was added.

        Raises:
            RegistryError: the file is there and cannot be read.
        """
        if not _HASH.fullmatch(sha256):
            return False
        try:
            with self.path.open("rb") as stream:
                return _found(stream, b"\n" + sha256.encode())
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RegistryError(f"{self.path} cannot be read ({error.strerror})") from error


def _found(stream: BinaryIO, wanted: bytes) -> bool:
    # Read, not mapped: a file that somebody shortens meanwhile would end the process (SIGBUS).
    tail = b""
    while block := stream.read(_BLOCK):
        data = tail + block
        if wanted in data:
            return True
        tail = data[-len(wanted) :]
    return False
