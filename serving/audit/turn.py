"""One writer at a time, of all threads and processes that append to a log: the lock of its folder.

>>> turn = Turn(folder)
>>> with turn.taken():
...     append()                    # nobody else does
>>> with undisturbed(folder):
...     read_the_end()              # nobody is in the middle of a line
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LOCK: Final = "lock"


class Turn:
    """The lock of a folder, opened when it is first taken."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor = -1

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the lock, and hold it.

        Raises:
            OSError: the folder is gone, or takes no files.
        """
        while True:
            self._descriptor = named(self._descriptor, self._path)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # Who takes a lock file away lets others make a new one, and they do not wait for us.
            if _same(self._descriptor, self._path):
                break
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let the file go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """Nobody appends meanwhile. A copy of a log has no lock, and nobody who would."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # of file systems without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def named(descriptor: int, path: Path) -> int:
    """The file that now has this name, open: `descriptor` if it is that one, else a new one, made
    if need be; -1 stands for none.

    Raises:
        OSError: it cannot be opened.
    """
    if descriptor >= 0 and _same(descriptor, path):
        return descriptor
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
    if descriptor >= 0:
        os.close(descriptor)
    return opened


def _same(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
