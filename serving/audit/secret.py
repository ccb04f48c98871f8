"""The site's key of the audit log: who has it can tell a true line, and write one.

A text file of its owner alone, one key a line in hex, 256 random bits each. The last one seals, all
of them verify, so a new key is a new line. It belongs on another volume than the log, and into the
backup: without it a log still shows that its lines follow each other, but no more who wrote them.

    >>> secrets = Secrets.open(Path("keys/audit.key"), make=True)   # made where there is none
    >>> secrets.current.id
    '1f3a5b7c'
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import re
import secrets as random
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dermaflux.errors import DermaFluxError

logger = logging.getLogger(__name__)


class AuditError(DermaFluxError):
    """The audit log cannot be written or read, or its key is not there."""


@dataclass(frozen=True, slots=True)
class Secret:
    """One key. `id` tells it from others: the first 8 hex digits of its sha256."""

    id: str
    key: bytes

    @classmethod
    def of(cls, key: bytes) -> Self:
        """The secret of 32 bytes."""
        return cls(hashlib.sha256(key).hexdigest()[:8], key)

    def mac(self, content: bytes) -> str:
        """HMAC-SHA256 of some bytes, in hex."""
        return hmac.digest(self.key, content, "sha256").hex()

    def __repr__(self) -> str:
        return f"Secret({self.id})"


@dataclass(frozen=True)
class Secrets:
    """All keys of a file, by id; `current` is the one that seals."""

    current: Secret
    known: dict[str, Secret]

    @classmethod
    def open(cls, path: Path, *, make: bool = False) -> Self:
        """Read the file; with `make`, write one with a new key where there is none.

        Raises:
            AuditError: it is missing, unreadable, or has something else than keys.
        """
        if make and not path.exists():
            add(path)
        try:
            text = path.read_text("ascii")
            mode = path.stat().st_mode & 0o777
        except FileNotFoundError:
            raise AuditError(
                f"there is no key of the audit log at {path}; take it from the backup, or make one "
                f"with: python -m serving.audit key {path}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise AuditError(f"the audit log's key {path} cannot be read: {error}") from None
        if mode & 0o077:
            logger.warning("%s is open to others (mode %04o); use: chmod 600 %s", path, mode, path)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines or not all(re.fullmatch(r"[0-9a-f]{64}", line) for line in lines):
            raise AuditError(
                f"{path} is no key of an audit log, which is lines of 64 hex digits; take it from "
                "the backup"
            )
        found = [Secret.of(bytes.fromhex(line)) for line in lines]
        return cls(found[-1], {one.id: one for one in found})


def add(path: Path) -> Secret:
    """Append a new key to a file, which is made if it is not there, for its owner alone.

    Raises:
        OSError: the folder is not there or takes no files; the file is as it was.
    """
    key = random.token_bytes(32)
    line = key.hex().encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        # People paste keys, and editors leave the last line without its end.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Secret.of(key)
