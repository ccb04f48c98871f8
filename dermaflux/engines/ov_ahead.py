"""Modulation of the steps to come, computed some at once and kept for who asks next.

A row depends on timestep, guidance and pooled text alone. Weights are read from memory once for
`BLOCK` rows instead of once a step, and a prompt that is drawn again with as many steps finds its
rows made. A block is always of as many rows, of one item: so a row has the same bits whoever else
is in the batch, and whenever it is asked for.

    >>> ahead = Ahead(compute, width=9728, guided=True)
    >>> item = ahead.item(pooled, guidance, timesteps)      # of one picture
    >>> item.row(timesteps[0])                              # float32 [width]; seven more are made
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Final

import numpy as np

from dermaflux.engines import Array, Arrays

BLOCK: Final = 8
"""Rows of one call. More gain little: weights are read an eighth as often already, and a picture
that is cancelled has computed rows in vain."""
_KEPT_BYTES: Final = 64 * 2**20
"""Of rows that are kept: 1,700 of the embedded default, 15 of FLUX.1."""

_Key = tuple[bytes, bytes, bytes]


class Ahead:
    """Rows float32 [width], by item and timestep. Safe to use from several threads.

    `compute` gets `timestep` [8], `pooled_projections` [8, P] and, where `guided`, `guidance` [8],
    and gives [8, 1, width].
    """

    def __init__(self, compute: Callable[[Arrays], Array], width: int, guided: bool) -> None:
        self._compute = compute
        self._guided = guided
        self._most = max(BLOCK, _KEPT_BYTES // (4 * width))
        self._rows: OrderedDict[_Key, Array] = OrderedDict()
        self._lock = Lock()

    def item(self, pooled: Array, guidance: Array | None, timesteps: Array) -> Item:
        """The rows of one picture: `pooled` [P], `guidance` [] or None, and its timesteps to come
        in order, float32 [K], which may be none."""
        return Item(self, pooled, guidance, timesteps)

    def known(self, key: _Key) -> Array | None:
        """A row that is kept."""
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
            return row

    def block(self, pooled: Array, guidance: Array | None, timesteps: Array) -> Array:
        """Rows [8, width] for timesteps [8]."""
        inputs = {"timestep": timesteps, "pooled_projections": np.tile(pooled, (BLOCK, 1))}
        if self._guided:
            assert guidance is not None
            inputs["guidance"] = np.tile(guidance, BLOCK)
        return self._compute(inputs).reshape(BLOCK, -1)

    def keep(self, rows: dict[_Key, Array]) -> None:
        """Keep rows, and let those go that nobody asked for the longest."""
        with self._lock:
            self._rows |= rows
            while len(self._rows) > self._most:
                self._rows.popitem(last=False)


class Item:
    """One picture's rows; belongs to one thread. Its last block is its own, so that many pictures
    at once cannot take each other's rows before they are used."""

    def __init__(
        self, ahead: Ahead, pooled: Array, guidance: Array | None, timesteps: Array
    ) -> None:
        self._ahead = ahead
        self._pooled = np.ascontiguousarray(pooled)
        self._guidance = guidance
        self._timesteps = np.asarray(timesteps, np.float32) + np.float32(0)
        self._of = (self._pooled.tobytes(), b"" if guidance is None else guidance.tobytes())
        self._block: dict[_Key, Array] = {}

    def row(self, timestep: Array) -> Array:
        """The row of a timestep [], float32 [width]: kept, or made with those that come after."""
        # Two noughts are equal and differ in a bit: a sum with one is the other.
        time = np.float32(timestep) + np.float32(0)
        key = (*self._of, time.tobytes())
        row = self._block.get(key)
        if row is None:
            row = self._ahead.known(key)
        if row is None:
            self._block = self._made(time)
            self._ahead.keep(self._block)
            row = self._block[key]
        return row

    def _made(self, timestep: np.float32) -> dict[_Key, Array]:
        places = np.flatnonzero(self._timesteps == timestep)
        start = int(places[0]) if len(places) else len(self._timesteps)
        ahead = self._timesteps[start : start + BLOCK] if len(places) else np.array([timestep])
        times = np.concatenate([ahead, np.repeat(ahead[-1:], BLOCK - len(ahead))])
        rows = self._ahead.block(self._pooled, self._guidance, times)
        # Copies, since a view of one row would keep the other seven in memory.
        return {
            (*self._of, time.tobytes()): row.copy()
            for time, row in zip(times[: len(ahead)], rows, strict=False)
        }
