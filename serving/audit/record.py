"""One line of the audit log: what may stand in it, its bytes, and what binds it to the line before.

    {"n":2,"prev":"5d41...","time":"2026-01-31T09:00:00.000000Z","event":"request","caller":"ward3",
     "route":"/v1/generate","outcome":"done","status":200,"bundle":"0a1b...","results":["9f86..."],
     "request":"7c2e...","key":"1f3a5b7c","mac":"c0ff..."}

(on one line). `prev` is the sha256 of the line before, its end included, so that nobody can change,
cut, move or repeat a line without a break behind it; `mac` is the HMAC-SHA256 (RFC 2104) of
everything before it under the site's key, so that nobody without the key can write the file anew.

Every field has a form that neither a prompt, nor a file name, nor a picture fits into.

    >>> event = Event(caller="ward3", route="/v1/classify", outcome="done", status=200)
    >>> line = sealed(event, n=1, prev=ZERO, time=stamp(), secret=secret)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from serving.audit.secret import Secret

ZERO: Final = "0" * 64
"""What the first line of a log follows."""
MAX_LINE: Final = 16_384
"""Bytes, the end included. `MAX_RESULTS` hashes take 6,000 of them."""
MAX_RESULTS: Final = 100

_WORD: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_FORMS: Final = {
    "event": _WORD,
    "outcome": _WORD,
    # As ids of keys; `anonymous` is one. "" is the service itself.
    "caller": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}"),
    # A template of ours, never the address that was asked for: no query, no name of a file.
    "route": re.compile(r"/[a-z0-9/_{}-]{0,99}(\.json)?"),
    "bundle": re.compile(r"[0-9a-f]{16}"),
    "request": re.compile(r"[A-Za-z0-9._-]{1,64}"),
    "address": re.compile(r"[0-9a-fA-F.:]{2,45}"),
}
RESULT: Final = re.compile(r"[0-9a-f]{64}")
"""A sha256 in hex."""
_NOTE: Final = re.compile(r"[A-Za-z0-9._:+-]{0,64}")

LINE: Final = re.compile(
    rb'(\{"n":([1-9]\d{0,17}),"prev":"([0-9a-f]{64})","time":"([0-9TZ:.-]{27})",'
    rb'"event":"([a-z0-9_-]+)"[^\n]*,"key":"([0-9a-f]{8})"),"mac":"([0-9a-f]{64})"\}\n'
)
"""A whole line: what `mac` is of, n, prev, time, event, key, mac."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Who did what, with which bundle, and what came out; "" and None are left out of the line.

    `event` is `request`, or what the log says of itself. `route` is a template such as
    `/v1/generate`, `outcome` a word such as `done` or an error's code, `status` HTTP's. `results`
    are sha256 in hex, at most `MAX_RESULTS`: of pictures' pixels (uint8 [height, width, 3], before
    any marking) or of an answer (`answer_hash`). `note` holds short words and numbers of events
    that are no requests.

    Raises:
        ValueError: a field has another form. The message has no value, for it may be a name.
    """

    event: str = "request"
    caller: str = ""
    route: str = ""
    outcome: str = ""
    status: int | None = None
    bundle: str = ""
    results: tuple[str, ...] = ()
    request: str = ""
    address: str = ""
    note: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, form in _FORMS.items():
            value = getattr(self, name)
            if value and not form.fullmatch(value):
                raise ValueError(f"the audit log takes no such {name}; it needs {form.pattern}")
        if not self.event:
            raise ValueError("an event of the audit log needs a name")
        if self.status is not None and not 100 <= self.status <= 599:
            raise ValueError("the audit log takes no such status; it needs 100 to 599")
        if len(self.results) > MAX_RESULTS or not all(map(RESULT.fullmatch, self.results)):
            raise ValueError(f"the audit log takes up to {MAX_RESULTS} sha256 in hex as results")
        for name, note in self.note.items():
            fits = isinstance(note, int) or _NOTE.fullmatch(note)
            if len(self.note) > 10 or not _WORD.fullmatch(name) or not fits:
                raise ValueError("the audit log takes up to ten short words as a note")

    def values(self) -> dict[str, Any]:
        """What the line says of it, in the line's order."""
        found: dict[str, Any] = {"event": self.event}
        for name in ("caller", "route", "outcome", "status", "bundle"):
            found[name] = getattr(self, name)
        found |= {"results": list(self.results), "request": self.request, "address": self.address}
        found["note"] = dict(self.note)
        return {name: value for name, value in found.items() if value not in ("", None, [], {})}


def sealed(event: Event, *, n: int, prev: str, time: str, secret: Secret) -> bytes:
    """The line of an event: number `n`, after the line whose hash is `prev`."""
    content = {"n": n, "prev": prev, "time": time, **event.values(), "key": secret.id}
    # ASCII alone, so that a line has one form and no character of another alphabet ends it.
    body = json.dumps(content, separators=(",", ":")).encode("ascii")[:-1]
    line = body + b',"mac":"' + secret.mac(body).encode() + b'"}\n'
    assert len(line) <= MAX_LINE, "no event is so long"
    return line


def line_hash(line: bytes) -> str:
    """What the next line has as `prev`: the sha256 of a line with its end, in hex."""
    return hashlib.sha256(line).hexdigest()


def genuine(found: re.Match[bytes], secret: Secret) -> bool:
    """Whether a line that `LINE` matched was sealed with this secret."""
    return hmac.compare_digest(secret.mac(found[1]).encode(), found[7])


def answer_hash(answer: Mapping[str, Any]) -> str:
    """The sha256 of an answer, as JSON with sorted keys and without spaces: a result to record."""
    text = json.dumps(answer, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def stamp(at: datetime | None = None) -> str:
    """A moment, now if none is given, as lines have it: UTC, microseconds, 27 characters."""
    moment = (at or datetime.now(UTC)).astimezone(UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
