"""What has to be in a log, told from outside its lines: the head, and anchors of the service's log.

>>> wanted = Anchors(logged_anchors(Path("service.log")))
>>> wanted.meet(file, row, n, hashed, verdict)          # for each line
>>> wanted.settle(verdict)                              # what no line met is gone
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from serving.audit import ending
from serving.audit.record import LINE, MAX_LINE
from serving.audit.secret import AuditError, Secrets
from serving.audit.verdict import Verdict

ANCHOR: Final = re.compile(r"(?:audit anchor )?(?:(\d{1,18}):)?([0-9a-f]{64})")
LOGGED: Final = re.compile(r"audit anchor (\d{1,18}):([0-9a-f]{64})")


def logged_anchors(file: Path) -> list[str]:
    """The anchors in a log of the service, text or JSON lines.

    Raises:
        OSError: it cannot be read.
    """
    with file.open(encoding="utf-8", errors="replace") as stream:
        return [f"{n}:{value}" for line in stream for n, value in LOGGED.findall(line)]


class Anchors:
    """What lines have to be met, by number or by hash alone."""

    def __init__(self, given: Iterable[str]) -> None:
        self.numbered: dict[int, dict[str, str]] = {}
        self.bare: set[str] = set()
        self.met = 0
        """The number of the last line that an anchor tells of."""
        self.headed = False
        """Whether the line that the head tells of was met. Behind it there may be more: those that
        were written while this reads, or just before a power failure."""
        for text in given:
            found = ANCHOR.fullmatch(text.strip())
            if found is None:
                raise AuditError(f"{text!r} is no anchor; it needs NUMBER:HASH or HASH, as logged")
            if found[1]:
                self.numbered.setdefault(int(found[1]), {})[found[2]] = "an anchor"
            else:
                self.bare.add(found[2])

    def take_end(self, last: Path, secrets: Secrets | None, verdict: Verdict) -> bytes | None:
        """The folder's head is one more anchor, where `last` is the folder's last file; else what
        is to follow `last`: the first line of the next file, nothing where it has none. None where
        the head is damaged, which is told already."""
        try:
            head = ending.read_head(last.parent, secrets)
        except AuditError as error:
            verdict.fault(None, 0, f"{error}: edited, or cut off by a power failure")
            return None
        number = ending.number_of(last)
        if number and head is not None and head.file <= number:
            self.numbered.setdefault(head.n, {})[head.hash] = ending.HEAD
        following = ending.file_of(last.parent, number + 1)
        if not number or not following.exists():
            return b""
        with following.open("rb") as stream:
            return stream.readline(MAX_LINE + 1)

    def end(self, last: Path, follower: bytes, verdict: Verdict) -> None:
        """Whether it is shown that the last line is the last: by the head, an anchor, or the line
        that follows it in another file."""
        if self.headed or self.met == verdict.last:
            return
        found = LINE.fullmatch(follower)
        if found is None:
            words = (
                f"nothing shows that no lines were cut off its end, after n {verdict.last}: "
                f"{last.parent} has no {ending.HEAD} of it, and no anchor of it was given; give "
                "the service's own log with --anchors"
            )
            verdict.fault(None, 0, words)
        elif found[3].decode() != verdict.hash:
            words = f"the next file goes on after n {int(found[2]) - 1}, and not after this line"
            verdict.fault(last, 0, f"{last.name} ends at n {verdict.last}; {words}")

    def meet(self, file: Path, number: int, n: int, hashed: str, verdict: Verdict) -> None:
        """Compare a line with what is told of its number."""
        if hashed in self.bare:
            self.bare.discard(hashed)
            self.met = n
        for told, source in self.numbered.pop(n, {}).items():
            self.met = n
            self.headed |= source == ending.HEAD
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
