"""Was this picture, or this answer, made here? The audit log has the hash of every result.

>>> Results(Path("audit")).known("9f86...")
True
"""

from __future__ import annotations

import json
from pathlib import Path

from serving.audit.ending import files_of
from serving.audit.record import LINE, MAX_LINE, RESULT


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
    # Read, not mapped: a file that somebody shortens meanwhile would end the process (SIGBUS).
    wanted = value.encode()
    with file.open("rb") as stream:
        for line in iter(lambda: stream.readline(MAX_LINE), b""):
            # `prev` and `mac` are hashes too, but no results.
            if wanted in line and LINE.fullmatch(line) and value in _results(line):
                return True
    return False


def _results(line: bytes) -> list[str]:
    try:
        found = json.loads(line).get("results", [])
    except ValueError:
        return []
    return found if isinstance(found, list) else []
