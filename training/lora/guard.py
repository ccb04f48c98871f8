"""What keeps a run from harm: signals are noted and not obeyed at once; a folder has one run.

>>> with signals() as got, locked(Path("runs/lora")):
...     while not got: step()
"""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.lora.state import StateError


@contextmanager
def signals() -> Iterator[list[int]]:
    """Within the block SIGTERM and SIGINT are noted in the list, and nothing else happens; a
    second one of a kind does what it did before."""
    got: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        got.append(number)
        signal.signal(number, before[number])

    for number in map(int, (signal.SIGTERM, signal.SIGINT)):
        before[number] = signal.getsignal(number)
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path, first: bool = True) -> Iterator[None]:
    """Holds a folder for one run, until it ends however it ends; only its
    `first` process asks."""
    with (folder / ".lock").open("w") as lock:
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(
                    f"another run is writing to {folder}; give another --out"
                ) from None
        yield
