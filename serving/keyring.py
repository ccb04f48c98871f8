"""The API keys that a service takes: hashes and roles, read anew when their file changes.

One JSON object a line, made by `python -m serving.keys new`; lines that are empty or begin with `#`
are left out. No key is stored, only its SHA-256: a key is 256 random bits, so there is no list of
likely ones to try and a slow hash such as scrypt, which is for passwords, would only make every
request slower.

    {"id": "ward3", "sha256": "9f86...", "roles": ["classify"], "created": "2026-01-31T09:00:00Z"}

    >>> keyring = Keyring(Path("keys.jsonl"))
    >>> keyring.find("dermaflux_...")       # its entry; None where it is no key, or no more
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from dermaflux.errors import DermaFluxError

logger = logging.getLogger(__name__)

Role = Literal["generate", "classify", "free-text", "admin"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)

ANONYMOUS: Final = "anonymous"
"""What callers without a key are called."""
MARK: Final = "dermaflux_"
"""How every key begins, so that scanners of source code and logs recognise one."""
MAX_BYTES: Final = 1_000_000
"""Of the file: some thousand keys. It is read between requests."""
LOOK_SECONDS: Final = 1.0
"""A change is seen so soon; looking costs one stat."""


class KeysError(DermaFluxError):
    """The file of keys cannot be read, or one of its lines is wrong."""


class Entry(BaseModel):
    """One key, without the key. Its id goes into logs and names its holder's turn in the queue."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    roles: Annotated[list[Role], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    note: Annotated[str, Field(max_length=200)] = ""

    @field_validator("id")
    @classmethod
    def _somebody(cls, name: str) -> str:
        if name == ANONYMOUS:
            raise ValueError(f"{ANONYMOUS} is the name of callers without a key")
        return name

    def valid(self, now: datetime) -> bool:
        """Whether its key is taken at `now`, which has a time zone."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def digest(key: str) -> str:
    """The SHA-256 of a key, in hex, as `Entry.sha256` has it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def parse(text: str, source: str) -> list[Entry]:
    """The entries of a text of JSON lines; `source` names it in errors, which repeat no value.

    Raises:
        KeysError: a line is wrong, an id is used twice by keys that are not revoked, or no entry is
            there: an empty file is more likely half a copy than a wish to lock everybody out.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entries.append(Entry.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in fault["loc"]) or "the line"
            raise KeysError(
                f"{source}, line {number}: {field}: {fault['msg']}. A line is what "
                "`python -m serving.keys new` prints"
            ) from None
    if not entries:
        raise KeysError(
            f"{source} has no key. Make one with: python -m serving.keys new --id NAME --roles "
            f"{','.join(ROLES)}; to lock somebody out use `revoke`"
        )
    _refuse_doubles(entries, source)
    return entries


def read(path: Path) -> tuple[list[Entry], tuple[int, int, int]]:
    """The entries of a file, and the file's signature (mtime in ns, size, inode) before the read.

    Raises:
        KeysError: it is missing, unreadable, too large or wrong.
    """
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeysError(
            f"the keys of {path} cannot be read: {error.strerror}. Make the file with: "
            f"python -m serving.keys new --id NAME --roles {','.join(ROLES)} --file {path}"
        ) from None
    if len(data) > MAX_BYTES:
        raise KeysError(f"{path} has more than {MAX_BYTES:,} bytes; it cannot be a file of keys")
    if found.st_mode & 0o777 & ~0o640:
        logger.warning(
            "%s may be read or written by others (mode %04o); use: chmod 600 %s",
            path,
            stat.S_IMODE(found.st_mode),
            path,
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not text in UTF-8") from None
    return parse(text, str(path)), _signature(found)


class Keyring:
    """Entries of a file and of a text (for containers that hand over variables), found by key."""

    def __init__(
        self,
        path: Path | None,
        inline: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read both.

        Raises:
            KeysError: one of them is wrong; later changes that are wrong only make a log line.
        """
        self._path = path
        self._fixed = parse(inline, "DERMAFLUX_KEYS_INLINE") if inline else []
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._entries: tuple[Entry, ...] = tuple(self._fixed)
        if path is not None:
            self._take(*read(path))
        self._looked = clock()

    def find(self, key: str, now: datetime | None = None) -> Entry | None:
        """The entry of a key that is taken now.

        All entries are compared, each in constant time, so that the time tells nothing of them.
        """
        self._look()
        given = digest(key)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(given, entry.sha256):
                found = entry
        return found if found is not None and found.valid(now or datetime.now(UTC)) else None

    def _look(self) -> None:
        """Read the file again if it changed; where the new one is wrong, the old keys stay."""
        now = self._clock()
        if self._path is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            signature = _signature(os.stat(self._path))
        except OSError:
            signature = (0, 0, 0)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._take(*read(self._path))
        except KeysError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("keys read again: %d entries", len(self._entries))

    def _take(self, entries: list[Entry], signature: tuple[int, int, int]) -> None:
        together = [*self._fixed, *entries]
        _refuse_doubles(together, f"{self._path} and DERMAFLUX_KEYS_INLINE")
        self._entries = tuple(together)
        self._seen = signature


def _signature(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_size, found.st_ino


def _refuse_doubles(entries: Iterable[Entry], source: str) -> None:
    uses = Counter(entry.id for entry in entries if entry.revoked is None)
    twice = sorted(name for name, count in uses.items() if count > 1)
    if twice:
        raise KeysError(f"{source}: the id {twice[0]} has several keys; revoke all but one")
