"""Does a log still hold: is every line the one that was written, behind the one that it followed?

Read as a stream, a line at a time, so a log of any length takes the same memory. With the site's
key every line's seal is looked at; without it only that each follows the one before, which whoever
wrote the whole file anew has seen to. What ends too early is told by the head, and by anchors;
where neither is there it is a fault, for nobody could know.

    >>> verify(files_of(folder), secrets, anchors=["1000:5d41..."])
    Verdict(holds=True, lines=1000, ...)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from serving.audit import ending
from serving.audit.anchors import Anchors
from serving.audit.record import LINE, MAX_LINE, genuine, line_hash
from serving.audit.secret import Secrets
from serving.audit.turn import undisturbed
from serving.audit.verdict import Verdict

FIRST: Final = (b"begun", b"continued", b"missing")
"""Events with which a file begins."""
NOTED: Final = {
    b"gap": "events were not recorded: the disk took none",
    b"head-gone": "head.json was gone when the service started; lines before may be, too",
    b"head-damaged": "head.json was damaged when the service started; lines before may be gone",
}
"""What the log says of itself that whoever verifies it should know."""
REPLACED: Final = b"replaced"


def verify(
    files: Sequence[Path], secrets: Secrets | None = None, anchors: Iterable[str] = ()
) -> Verdict:
    """Read the files in this order, and compare their lines with each other and with the anchors.

    An anchor is `NUMBER:HASH` or `HASH`, as the service logs it. That nothing was cut off the end
    is shown by the head, where the last of the files is the last of its folder; by the first line
    of the file that follows it there; or by an anchor of the last line. It is a fault if none does.

    Raises:
        AuditError: an anchor has another form.
        OSError: a file cannot be read.
    """
    verdict = Verdict(keyed=secrets is not None)
    wanted = Anchors(anchors)
    follower: bytes | None = b""
    size = 0
    if files:
        # A service may be in the middle of a line.
        with undisturbed(files[-1].parent):
            follower = wanted.take_end(files[-1], secrets, verdict)
            size = files[-1].stat().st_size
    chain = _Chain(verdict, secrets, wanted)
    for file in files:
        with file.open("rb") as stream:
            left = size if file is files[-1] else None
            for number, line in enumerate(_lines(stream, left), 1):
                chain.take(file, number, line)
    if not verdict.lines:
        verdict.fault(None, 0, "there is no line at all")
    wanted.settle(verdict)
    if verdict.holds and follower is not None:
        wanted.end(files[-1], follower, verdict)
    for folder in dict.fromkeys(file.parent for file in files):
        torn = folder / ending.TORN
        if torn.exists():
            pieces = torn.read_bytes().count(b"\n")
            verdict.notes.append(f"{pieces} pieces of lines that a kill cut off are in {torn}")
    return verdict


def _lines(stream: BinaryIO, size: int | None) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long its beginning, which fits no form. `size` is
    where to stop, None at the end."""
    while size != 0 and (line := stream.readline(MAX_LINE + 1)):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE)
        if size is not None and stream.tell() >= size:
            return


class _Chain:
    """Takes line by line, and knows what has to come next."""

    def __init__(self, verdict: Verdict, secrets: Secrets | None, anchors: Anchors) -> None:
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
        if found[4] < self._time:
            verdict.note(f"{file.name}, line {number}: the clock had been set back")
        if found[5] == REPLACED:
            words = "the log itself noted that the line before was put there in place of another"
            verdict.fault(file, number, words)
        elif found[5] in NOTED:
            verdict.note(f"{file.name}, line {number}: {NOTED[found[5]]}")
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
