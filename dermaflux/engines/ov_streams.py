"""A batch over all cores, a piece on each: faster than all cores on every product of the batch.

Threads that share a product wait for each other at its end, and for the one that does what is not
shared. So a batch is cut into as many pieces as there are streams, which run beside each other.
A batch of fewer pictures than streams would leave cores idle, and is left to the other way.

    >>> streams = Streams(compiled, count=2)
    >>> streams.run({"pixel_values": pixels})["logits"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final

import numpy as np

from dermaflux.engines import Array, Arrays

MOST: Final = 8
"""Streams at most: a bundle's `max_batch` as the export writes it. More cores share them."""


class Streams:
    """A graph whose inputs all begin with the batch's axis. Safe to use from several threads.

    `compiled` makes the model at the first batch, since a process that is asked for single pictures
    needs none; `count` are its streams.
    """

    def __init__(self, compiled: Callable[[], Any], count: int) -> None:
        self.count = count
        self._compiled = compiled
        self._model: Any = None
        self._making = Lock()
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def take(self, inputs: Arrays) -> bool:
        """Whether a batch is large enough."""
        return self.count > 1 and min(len(value) for value in inputs.values()) >= self.count

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> dict[str, Array]:
        """The outputs by name, in the order of the batch."""
        pieces = _cut(inputs, self.count)
        requests = [self._request() for _ in pieces]
        started = []
        try:
            for request, piece in zip(requests, pieces, strict=True):
                request.start_async(piece, share_inputs=True)
                started.append(request)
        finally:
            # Whoever reads the memory of a piece must be done before it is gone.
            failed = [error for request in started if (error := _ended(request)) is not None]
        if failed:
            raise failed[0]
        found = {
            name: np.concatenate([request.get_output_tensor(index).data for request in requests])
            for index, name in enumerate(outputs)
        }
        for request in requests:
            self._idle.put(request)
        return found

    def _request(self) -> Any:
        with self._making:
            if self._model is None:
                self._model = self._compiled()
        try:
            return self._idle.get_nowait()
        except Empty:
            return self._model.create_infer_request()


def _ended(request: Any) -> RuntimeError | None:
    """Wait for a request; why it failed, if it did."""
    try:
        request.wait()
    except RuntimeError as error:
        return error
    return None


def _cut(inputs: Arrays, count: int) -> list[Mapping[str, Array]]:
    """A batch in pieces whose lengths differ by one at most."""
    parts = {
        name: [np.ascontiguousarray(part) for part in np.array_split(value, count)]
        for name, value in inputs.items()
    }
    return [{name: part[number] for name, part in parts.items()} for number in range(count)]
