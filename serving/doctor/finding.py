"""What a look at one thing gives: a state, words, and the command that mends it.

>>> Finding("disk", FAIL, "/var/audit has 3 MB free, needs 200 MB", "rm or move files there")
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermaflux.doctor import FAIL, NOTE, OK

__all__ = ["FAIL", "NOTE", "OK", "Finding", "planned", "private"]


@dataclass(frozen=True)
class Finding:
    """`about` is what was looked at, `state` is `ok`, `note` (worth knowing) or `fail`; `mend` is a
    command, or what to do, where something is to be done."""

    about: str
    state: str
    words: str
    mend: str = ""


def planned(settings: object, name: str) -> Any:
    """The value of a setting that not every version of the service has; None where it has none."""
    return getattr(settings, name, None)


def private(about: str, file: Path, *, group: bool = False) -> list[Finding]:
    """Whether a file with a secret is there, and its owner's alone, or also its group's to read."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        return [Finding(about, FAIL, f"{file}: {error.strerror}", f"ls -l {file.parent}")]
    if mode & 0o022:
        words = f"{file} may be written by others (mode {mode:04o})"
        return [Finding(about, FAIL, words, f"chmod 600 {file}")]
    if mode & (0o037 if group else 0o077):
        words = f"{file} may be read by others (mode {mode:04o})"
        return [Finding(about, NOTE, words, f"chmod 600 {file}")]
    return []
