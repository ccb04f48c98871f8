"""What an engine says of how it was opened, for people: `what is not in 8 bits is in bf16, ...`.

Most have nothing to say. OpenVINO tries a classifier in bf16 where the processor has it, and what
came of that is known only once the file is open (`dermaflux.engines.ov_engine`).

    >>> note_of(load(bundle, choose(bundle, "classifier")))
    'what is not in 8 bits is in bf16, 8.1e-03 from fp32'
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dermaflux.engines import Engine


@runtime_checkable
class Noted(Protocol):
    """An engine that has something to say, or may have."""

    @property
    def note(self) -> str:
        """A sentence without an end; empty where there is nothing."""
        ...


def note_of(engine: Engine) -> str:
    """The engine's note; empty where it has none."""
    return engine.note if isinstance(engine, Noted) else ""
