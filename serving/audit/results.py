"""Was this picture, or this answer, made here? The audit log has the hash of every result.

>>> Results(Path("audit")).known("9f86...")
True
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from serving.audit.ending import files_of
from serving.audit.record import LINE, RESULT


class Results:
    """The hashes of all results in a log. Files are searched from the newest on, each time anew:
    some hundred megabytes a second, and no memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def known(self, sha256: str) -> bool:
        """Whether a line has this sha256, in hex, among its results. Seals are not looked at.

        Raises:
            OSError: the log cannot be read.
        """
        if not RESULT.fullmatch(sha256) or not self._folder.is_dir():
            return False
        return any(_in_file(file, sha256) for file in reversed(files_of(self._folder)))


def _in_file(file: Path, value: str) -> bool:
    with file.open("rb") as stream:
        if not stream.seek(0, 2):
            return False  # an empty file cannot be mapped
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            wanted, place = value.encode(), -1
            # `prev` and `mac` are hashes too, but no results.
            while (place := data.find(wanted, place + 1)) >= 0:
                begin = data.rfind(b"\n", 0, place) + 1
                line = data[begin : data.find(b"\n", place) + 1]
                if LINE.fullmatch(line) and value in json.loads(line).get("results", []):
                    return True
    return False
