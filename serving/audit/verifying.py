"""Does a log still hold: is every line the one that was written, behind the one that it followed?

Read as a stream, a line at a time, so a log of any length takes the same memory. With the site's
key every line's seal is looked at; without it only that each follows the one before, which whoever
wrote the whole file anew has seen to. What ends too early is told by the head, and by anchors.

    >>> verify(files_of(folder), secrets, anchors=["1000:5d41..."])
    Verdict(holds=True, lines=1000, ...)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from serving.audit import ending
from serving.audit.record import LINE, MAX_LINE, ZERO, genuine, line_hash
from serving.audit.secret import AuditError, Secrets

ANCHOR: Final = re.compile(r"(?:audit anchor )?(?:(\d{1,18}):)?([0-9a-f]{64})")
LOGGED: Final = re.compile(r"audit anchor (\d{1,18}):([0-9a-f]{64})")
FIRST: Final = (b"begun", b"continued", b"missing")
"""Events with which a file begins."""
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


def verify(
    files: Sequence[Path], secrets: Secrets | None = None, anchors: Iterable[str] = ()
) -> Verdict:
    """Read the files in this order, and compare their lines with each other and with the anchors.

    An anchor is `NUMBER:HASH` or `HASH`, as the service logs it. The head is compared where the
    last of the files is the last of its folder.

    Raises:
        AuditError: an anchor has another form.
        OSError: a file cannot be read.
    """
    verdict = Verdict(keyed=secrets is not None)
    wanted = _Anchors(anchors)
    if files:
        wanted.take_head(files[-1], secrets, verdict)
    chain = _Chain(verdict, secrets, wanted)
    for file in files:
        with file.open("rb") as stream:
            for number, line in enumerate(_lines(stream), 1):
                chain.take(file, number, line)
    if not verdict.lines:
        verdict.fault(None, 0, "there is no line at all")
    wanted.settle(verdict)
    for folder in dict.fromkeys(file.parent for file in files):
        torn = folder / ending.TORN
        if torn.exists():
            pieces = torn.read_bytes().count(b"\n")
            verdict.notes.append(f"{pieces} pieces of lines that a kill cut off are in {torn}")
    return verdict


def logged_anchors(file: Path) -> list[str]:
    """The anchors in a log of the service, text or JSON lines.

    Raises:
        OSError: it cannot be read.
    """
    with file.open(encoding="utf-8", errors="replace") as stream:
        return [f"{n}:{value}" for line in stream for n, value in LOGGED.findall(line)]


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long its beginning, which fits no form."""
    while line := stream.readline(MAX_LINE + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)


class _Anchors:
    """What lines have to be met, by number or by hash alone."""

    def __init__(self, given: Iterable[str]) -> None:
        self.numbered: dict[int, dict[str, str]] = {}
        self.bare: set[str] = set()
        for text in given:
            found = ANCHOR.fullmatch(text.strip())
            if found is None:
                raise AuditError(f"{text!r} is no anchor; it needs NUMBER:HASH or HASH, as logged")
            if found[1]:
                self.numbered.setdefault(int(found[1]), {})[found[2]] = "an anchor"
            else:
                self.bare.add(found[2])

    def take_head(self, last: Path, secrets: Secrets | None, verdict: Verdict) -> None:
        """The folder's head is one more, where `last` is the folder's last file."""
        number = ending.number_of(last)
        if not number or ending.file_of(last.parent, number + 1).exists():
            return
        try:
            head = ending.read_head(last.parent, secrets)
        except AuditError as error:
            verdict.fault(None, 0, f"{error}: edited, or cut off by a power failure")
            return
        if head is None:
            words = f"{last.parent} has no {ending.HEAD}: what was cut off its end goes unnoticed"
            verdict.notes.append(words)
        else:
            self.numbered.setdefault(head.n, {})[head.hash] = ending.HEAD

    def meet(self, file: Path, number: int, n: int, hashed: str, verdict: Verdict) -> None:
        """Compare a line with what is told of its number."""
        self.bare.discard(hashed)
        for told, source in self.numbered.pop(n, {}).items():
            if told != hashed:
                verdict.fault(file, number, f"(n {n}) is not the line that {source} tells of")

    def settle(self, verdict: Verdict) -> None:
        """What no line met was cut off, or lies before the files."""
        for n, hashes in sorted(self.numbered.items()):
            for told, source in hashes.items():
                if n > verdict.last:
                    words = f"the log was cut off: it ends at n {verdict.last}, and {source} "
                    verdict.fault(None, 0, f"{words}tells of n {n} ({told[:16]}...)")
                elif n and n < verdict.first:
                    words = f"n {n} of {source} lies before the first of these lines"
                    verdict.notes.append(f"{words}, {verdict.first}")
                elif n:
                    verdict.fault(None, 0, f"there is no line n {n}, of which {source} tells")
        for told in sorted(self.bare):
            words = f"no line has the hash {told}: the log was cut off or written anew"
            verdict.fault(None, 0, words)


class _Chain:
    """Takes line by line, and knows what has to come next."""

    def __init__(self, verdict: Verdict, secrets: Secrets | None, anchors: _Anchors) -> None:
        self._verdict = verdict
        self._secrets = secrets
        self._anchors = anchors
        self._doubtful = False
        """Whether the line before is not what was written, so that its hash tells nothing."""
        self._good = 0
        """The number of the last line that is."""
        self._time = b""

    def take(self, file: Path, number: int, line: bytes) -> None:
        """Look at the next line."""
        verdict = self._verdict
        verdict.lines += 1
        found = LINE.fullmatch(line)
        if found is None:
            verdict.fault(file, number, _shape(line))
            self._lose()
            return
        n, hashed = int(found[2]), line_hash(line)
        words = self._content(found)
        if words:
            verdict.fault(file, number, words)
            self._lose(n)
            return
        last, follows = verdict.last, found[3].decode() == verdict.hash
        if last and n <= (self._good if self._doubtful else last):
            words = "repeats the line before it" if hashed == verdict.hash else (
                f"is out of order or repeated: n {n} after {last}"
            )  # fmt: skip
            verdict.fault(file, number, words)
            return
        if not last:
            verdict.first = n
            if n == 1 and not follows and not self._doubtful:
                verdict.fault(file, number, "is the first of all and follows another")
            if n > 1 and not self._doubtful:
                self._begins(file, number, n, found[5])
        elif n > last + 1:
            own = " (the log itself noted it)" if found[5] == b"missing" else ""
            verdict.fault(
                file, number, f"lines are missing before it, n {last + 1} to {n - 1}{own}"
            )
        elif not follows and not self._doubtful:
            words = "does not follow the line before it: that one was edited, or lines replaced"
            verdict.fault(file, number, words)
        if found[4] < self._time and len(verdict.notes) < MAX_FINDINGS:
            verdict.notes.append(f"{file.name}, line {number}: the clock had been set back")
        self._time, self._doubtful, self._good = found[4], False, n
        verdict.last, verdict.hash = n, hashed
        self._anchors.meet(file, number, n, hashed, verdict)

    def _begins(self, file: Path, number: int, n: int, event: bytes) -> None:
        """The first line is not that of the whole log: is it the first of its file?"""
        if ending.number_of(file) == 1 or event not in FIRST:
            self._verdict.fault(file, number, f"lines are missing before it: it begins with n {n}")
        else:
            words = f"these files begin at n {n}; what came before is in older ones"
            self._verdict.notes.append(words)

    def _content(self, found: re.Match[bytes]) -> str:
        """What is wrong with the line itself, in words; "" if nothing."""
        if self._secrets is None:
            try:
                json.loads(found[0])
            except (ValueError, RecursionError):
                return "was edited: it is no JSON"
            return ""
        key = found[6].decode()
        secret = self._secrets.known.get(key)
        if secret is None:
            return f"is sealed with the key {key}, which is not among those given"
        return "" if genuine(found, secret) else "was edited: its content is not what was sealed"

    def _lose(self, n: int = 0) -> None:
        """Go on behind a line that is wrong, as if it stood for the one expected there."""
        verdict = self._verdict
        if verdict.last:
            verdict.last += 1
        elif n == 1 or not n:
            verdict.first, verdict.last = 1, 1
        self._anchors.numbered.pop(verdict.last, None)
        self._doubtful = True


def _shape(line: bytes) -> str:
    if len(line) > MAX_LINE:
        return f"has more than {MAX_LINE} bytes, which no line has"
    if not line.endswith(b"\n"):
        return "is half a line: the file was cut off there, or a kill left it"
    return "is no line of this log: it was edited or put in"
