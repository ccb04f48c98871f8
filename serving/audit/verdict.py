"""What verifying a log found: faults, each with its line, and notes.

>>> verdict = Verdict(keyed=True)
>>> verdict.fault(Path("audit-000001.jsonl"), 3, "was edited")
>>> verdict.holds, str(verdict.faults[0])
(False, 'audit-000001.jsonl, line 3: was edited')
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from serving.audit.record import ZERO

MAX_FINDINGS: Final = 100
"""Told in words; the rest is counted."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one line, counted from 1 in its file; line 0 is the file or the log."""

    file: str
    line: int
    words: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.words}" if self.line else self.words


@dataclass
class Verdict:
    """What was found. `first` and `last` are numbers of lines, `hash` is the last line's;
    `keyed` says whether seals were looked at. At most `MAX_FINDINGS` of `count` are in `faults`."""

    keyed: bool
    lines: int = 0
    first: int = 0
    last: int = 0
    hash: str = ZERO
    count: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return self.count == 0

    def fault(self, file: Path | None, line: int, words: str) -> None:
        """Count one thing that is wrong."""
        self.count += 1
        if len(self.faults) < MAX_FINDINGS:
            self.faults.append(Fault(file.name if file else "", line, words))

    def note(self, words: str) -> None:
        """Tell something that is not wrong, as long as there are few."""
        if len(self.notes) < MAX_FINDINGS:
            self.notes.append(words)
