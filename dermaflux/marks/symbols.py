"""A site's secret signs: one for every coefficient of a band, and how 32 bits ride on them.

Signs come from SHAKE-256 over the site's key, so that they are the same on every machine and mean
nothing without the key. In pictures of 256 pixels and more, half of the coefficients carry a
payload of four bytes with two of check: six symbols, each of which chooses one of 256 rows of a
Walsh-Hadamard matrix for its share. The detector takes the row that agrees best.

    >>> signs = Signs.of(key, bandwidth=128)
    >>> signs.read(signs.pattern(b"\\x01\\x02\\x03\\x04"))
    b'\\x01\\x02\\x03\\x04'
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dermaflux.marks.spectrum import Floats, band

PAYLOAD_BYTES: Final = 4
CHECK_BYTES: Final = 2
"""One in 65,536 payloads read from nothing passes, where a mark was found in the first place."""
SYMBOLS: Final = PAYLOAD_BYTES + CHECK_BYTES
PAYLOAD_FROM: Final = 128
"""Bandwidth from which there is room for a payload: below it all goes into being found."""


@dataclass(frozen=True, eq=False)
class Signs:
    """The signs of one key at one bandwidth; all arrays are [bandwidth, bandwidth].

    `base` is int8 in -1, 0 (outside the band), 1; `pilot` says which coefficients carry no payload,
    and `piloted` has the signs of those alone, float32; `symbol` and `column` say of the others
    which symbol they belong to and which column of the matrix they are.
    """

    key: bytes
    base: NDArray[np.int8]
    pilot: NDArray[np.bool_]
    piloted: Floats
    symbol: NDArray[np.uint8]
    column: NDArray[np.uint8]

    @classmethod
    def of(cls, key: bytes, bandwidth: int) -> Signs:
        """The signs of `key`, which is any bytes; made once and kept."""
        return _signs(key, bandwidth)

    def pattern(self, payload: bytes) -> Floats:
        """The signs to be written for a payload of four bytes: -1, 0 or 1."""
        assert len(payload) == PAYLOAD_BYTES, payload
        word = np.frombuffer(payload + self._check(payload), np.uint8)
        turned = _parity(word[self.symbol] & self.column) & ~self.pilot
        return np.where(turned, -self.base, self.base).astype(np.float32)

    def score(self, found: Floats) -> float:
        """How well coefficients agree with the pilot signs, in standard deviations of chance.

        Whatever the picture is, over random keys this is a sum of independent signs with known
        weights: it exceeds t with a probability of at most exp(-t^2 / 2) (Hoeffding 1963).
        """
        agreed = (found * self.piloted).astype(np.float64)
        length = np.sqrt(np.sum(agreed * agreed))
        return float(agreed.sum() / length) if length > 0 else 0.0

    def read(self, found: Floats) -> bytes | None:
        """The payload that coefficients carry, or None where its check does not come out."""
        if self.pilot.all():
            return None
        carried = ~self.pilot & (self.base != 0)
        table = np.zeros((SYMBOLS, 256))
        agreement = (found * self.base)[carried]
        np.add.at(table, (self.symbol[carried], self.column[carried]), agreement)
        word = (table @ _hadamard()).argmax(1).astype(np.uint8).tobytes()
        payload, check = word[:PAYLOAD_BYTES], word[PAYLOAD_BYTES:]
        return payload if check == self._check(payload) else None

    def _check(self, payload: bytes) -> bytes:
        return hashlib.shake_256(b"check" + self.key + payload).digest(CHECK_BYTES)


@lru_cache(maxsize=32)
def _signs(key: bytes, bandwidth: int) -> Signs:
    # One value each: how signs are drawn is part of what a mark is, and must never change.
    label = f"dermaflux watermark 1, {bandwidth}: ".encode()
    count = bandwidth * bandwidth
    drawn = np.frombuffer(hashlib.shake_256(label + key).digest(3 * count), np.uint8)
    first, column, third = drawn.reshape(3, bandwidth, bandwidth)
    base = np.where(first & 1, 1, -1).astype(np.int8) * band(bandwidth)
    pilot = (first & 2 > 0) if bandwidth >= PAYLOAD_FROM else np.ones_like(first, bool)
    piloted = np.where(pilot, base, 0).astype(np.float32)
    return Signs(key, base, pilot, piloted, third % SYMBOLS, column)


def _parity(values: NDArray[np.uint8]) -> NDArray[np.bool_]:
    odd: NDArray[np.bool_] = (np.bitwise_count(values) & 1).astype(bool)
    return odd


@lru_cache(maxsize=1)
def _hadamard() -> Floats:
    """Sylvester's matrix of order 256: row and column give the sign (-1)^popcount(row & column)."""
    number = np.arange(256, dtype=np.uint8)
    return np.where(_parity(number[:, None] & number[None, :]), -1, 1).astype(np.float32)
