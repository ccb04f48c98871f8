"""Items whose process died while they were drawn: they are drawn alone, and at last given up.

An item that exhausts memory takes its process along, and no exception tells of it. So the names of
what is in work stand in a small file, and who finds such a file at start knows that the process
before died over them. A kill by people leaves the same trace and costs nothing: an item drawn alone
is the same picture.

    >>> deaths = Deaths(folder.machinery / "deaths-1-of-1.json")
    >>> deaths.alone("0000017"), deaths.hopeless("0000017")
    (False, False)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_ALONE: Final = 2
"""Deaths from which an item is drawn alone: of a batch, one item is to blame and others are not."""
HOPELESS: Final = 5
"""Deaths from which an item is taken to have failed. The next run tries it again, from none."""


class Deaths:
    """How often a process died over each item, and what this one is at. One process writes it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._counts: dict[str, int] = {}
        self._at: set[str] = set()
        try:
            content = json.loads(file.read_bytes())
            self._counts = {str(name): int(count) for name, count in content["counts"].items()}
            died = [str(name) for name in content["at"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            # None is there, or a kill cut it off: then this death is not counted.
            return
        for name in died:
            self._counts[name] = self._counts.get(name, 0) + 1

    def begin(self, names: Iterable[str]) -> None:
        """These are in work from now on."""
        self._at |= set(names)
        self._write()

    def end(self, names: Iterable[str]) -> None:
        """These are not any more, however they ended; their deaths are forgotten."""
        names = set(names)
        self._at -= names
        if names & self._counts.keys():
            self._counts = {k: v for k, v in self._counts.items() if k not in names}
        self._write()

    def alone(self, name: str) -> bool:
        """Whether an item is to be drawn without neighbours."""
        return self._counts.get(name, 0) >= _ALONE

    def hopeless(self, name: str) -> bool:
        """Whether an item is to be taken for failed, unseen."""
        return self._counts.get(name, 0) >= HOPELESS

    def close(self) -> None:
        """Nothing is in work: this process did not die."""
        self._at = set()
        if self._counts:
            self._write()
        else:
            self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        # Not flushed to the disk: what outlives a process outlives it in the system's memory too.
        text = json.dumps({"counts": self._counts, "at": sorted(self._at)})
        temporary = self._file.with_suffix(".new")
        temporary.write_text(text)
        os.replace(temporary, self._file)
