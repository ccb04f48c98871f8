"""A graph compiled once for all shapes, or anew for each that it is asked with.

A graph whose axes are free has its sizes worked out in every call, and values are joined by copies
that a graph of fixed sizes places where they belong from the start. So a small graph, whose steps
take milliseconds, is compiled for the shapes that it gets; a large one is not, since every compiled
graph holds weights of its own and what is gained is nothing beside its products.

    >>> shaped = Shaped(model, compile_for, most=kept_at_once(10_000_000))
    >>> with shaped.request({"x": (2, 64)}) as request:
    ...     request.infer({"x": x})
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any, Final

MOST_FIXED_BYTES: Final = 128 * 2**20
"""Of a graph's file that is compiled for shape after shape."""
MOST: Final = 12
"""Shapes that stay compiled: batches of 1, 2, 4 and 8 in three sizes of picture."""
LEAST: Final = 4
"""Shapes that stay compiled whatever they take: the batches of one size."""
_KEPT_BYTES: Final = 512 * 2**20
"""Of all that stay compiled beyond `LEAST`, each taken for a file."""

Shapes = Mapping[str, tuple[int, ...]]


def kept_at_once(size: int) -> int:
    """For how many shapes a graph of a file of `size` bytes stays compiled; 0: it is for all."""
    if size > MOST_FIXED_BYTES:
        return 0
    return max(LEAST, min(MOST, _KEPT_BYTES // max(size, 1)))


class Slot:
    """A compiled graph and its requests that nobody uses."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self._idle: SimpleQueue[Any] = SimpleQueue()

    def take(self) -> Any:
        """A request of one's own, until it is given back."""
        try:
            return self._idle.get_nowait()
        except Empty:
            return self.compiled.create_infer_request()

    def give(self, request: Any) -> None:
        """Let others use a request."""
        self._idle.put(request)


class Shaped:
    """A model, compiled by `compiled` for one set of shapes at a time, of which the `most` last
    used are kept; of 0 it is compiled once for all. Safe to use from several threads."""

    def __init__(self, model: Any, compiled: Callable[[Any], Any], most: int) -> None:
        self._compiled = compiled
        self._most = most
        self.inputs = tuple(port.get_any_name() for port in model.inputs)
        self._slots: OrderedDict[tuple[tuple[int, ...], ...], Slot] = OrderedDict()
        self._looking, self._making = Lock(), Lock()
        self._model = model
        if not most:
            # At once, for a model that is kept besides would hold a large one's weights twice.
            self._slots[()] = Slot(compiled(model))
            self._model = None

    def slot(self, shapes: Shapes) -> Slot:
        """What is compiled for these shapes of the inputs, made now where there is none."""
        key = tuple(tuple(shapes[name]) for name in self.inputs) if self._most else ()
        slot = self._known(key)
        if slot is not None:
            return slot
        # A second caller with the same shapes waits for the first one's; those whose shapes are
        # compiled do not.
        with self._making:
            slot = self._known(key)
            if slot is None:
                self._model.reshape({name: list(shapes[name]) for name in self.inputs})
                slot = Slot(self._compiled(self._model))
                with self._looking:
                    self._slots[key] = slot
                    if len(self._slots) > self._most:
                        self._slots.popitem(last=False)
            return slot

    def _known(self, key: tuple[tuple[int, ...], ...]) -> Slot | None:
        with self._looking:
            slot = self._slots.get(key)
            if slot is not None:
                self._slots.move_to_end(key)
            return slot

    @contextmanager
    def request(self, shapes: Shapes) -> Iterator[Any]:
        """A request for these shapes, for the time of a block."""
        slot = self.slot(shapes)
        request = slot.take()
        try:
            yield request
        finally:
            slot.give(request)

    def compiled(self) -> tuple[Any, ...]:
        """All that is compiled now, the last used first."""
        with self._looking:
            return tuple(slot.compiled for slot in reversed(self._slots.values()))
