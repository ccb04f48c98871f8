"""The site's own keys: for signing, with its certificates, and for the watermark.

They are made when they are first asked for, in a folder that only their owner can read, and may be
replaced by the site's own at any time:

    keys/chain.pem       the certificate that signs, then those above it
    keys/key.pem         its private key
    keys/anchors.pem     authorities that are believed: ours, earlier ones, those of other sites
    keys/watermark.keys  one key a line, in hex; the first marks, all are looked for

    >>> keys = Keys.open(Path("/var/lib/dermaflux/marks/keys"))
    >>> keys.signer.algorithm
    'es256'
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dermaflux.marks.certificates import MarksError, Signer, certificates, checked, made

if TYPE_CHECKING:
    from dermaflux.doctor import Finding

WARN_DAYS: Final = 90
"""Before the end from which the doctor speaks of it: a purchase of a certificate takes weeks."""
WATERMARK_KEY_BYTES: Final = 32
MAX_WATERMARK_KEYS: Final = 16
"""Each takes its time in every search, and makes chance more likely."""

CHAIN: Final = "chain.pem"
KEY: Final = "key.pem"
ANCHORS: Final = "anchors.pem"
WATERMARK: Final = "watermark.keys"
_SECRET: Final = (KEY, WATERMARK)


@dataclass(frozen=True)
class Keys:
    """What marks are made and verified with. Private parts stay out of its `repr`."""

    chain: bytes
    anchors: bytes
    signer: Signer
    key: bytes = field(repr=False)
    watermark: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, *, make: bool = True) -> Keys:
        """The keys of a folder, made there if it is not there or empty and `make` allows it.

        Raises:
            MarksError: what is there is incomplete, cannot be read or does not fit together.
        """
        if make and not (folder.is_dir() and any(folder.iterdir())):
            _make(folder)
        chain, key = _bytes(folder / CHAIN), _bytes(folder / KEY)
        anchors = _bytes(folder / ANCHORS)
        try:
            signer = checked(chain, key)
        except MarksError as error:
            raise MarksError(f"{folder}, {CHAIN} and {KEY}: {error}") from error
        try:
            certificates(anchors)
        except MarksError as error:
            raise MarksError(f"{folder / ANCHORS}: {error}") from error
        return cls(chain, anchors, signer, key, _watermark_keys(folder / WATERMARK))


def findings(folder: Path, now: datetime | None = None) -> list[Finding]:
    """What a doctor says of a folder of keys: there or not, who can read it, when it ends."""
    from dermaflux.doctor import FAIL, NOTE, OK, Finding

    about = "provenance keys"
    now = now or datetime.now(UTC)
    if not folder.exists():
        return [Finding(about, NOTE, f"{folder} is not there; it is made at the first start")]
    try:
        keys = Keys.open(folder, make=False)
    except MarksError as error:
        return [Finding(about, FAIL, str(error))]
    signer = keys.signer
    left = (signer.not_after - now).days
    ends = f"{signer.subject}, {signer.algorithm}, until {signer.not_after:%Y-%m-%d}"
    renew = (
        f"keep {folder / ANCHORS}, put another certificate and key into {CHAIN} and {KEY}, and add "
        f"its authority to {ANCHORS}"
    )
    if not signer.not_before <= now < signer.not_after:
        found = [Finding(about, FAIL, f"not valid now ({now:%Y-%m-%d}): {ends}; {renew}")]
    elif left < WARN_DAYS:
        found = [Finding(about, NOTE, f"{left} days are left: {ends}; {renew}")]
    else:
        found = [Finding(about, OK, ends)]
    for name in _SECRET:
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        if mode & 0o077:
            file = folder / name
            words = f"{file} has mode {mode:04o}; others may read it. Use: chmod 600 {file}"
            found.append(Finding(about, NOTE, words))
    return found


def _make(folder: Path) -> None:
    """Write new keys beside the folder, then rename: whole or not at all, and first come wins."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise MarksError(
            f"{folder} cannot be made ({error.strerror}); make it writable for this user, or name "
            "another folder"
        ) from error
    try:
        chain, authority, key = made(datetime.now(UTC))
        mark = f"{secrets.token_hex(WATERMARK_KEY_BYTES)}\n".encode()
        content = {CHAIN: chain, ANCHORS: authority, KEY: key, WATERMARK: mark}
        for name, data in content.items():
            descriptor = os.open(beside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                os.fsync(stream.fileno())
        try:
            beside.rename(folder)
        except OSError:
            # Another worker of the same service was quicker: its keys are the site's.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MarksError(
            f"{path} cannot be read ({error.strerror}). A folder of keys holds {CHAIN}, {KEY}, "
            f"{ANCHORS} and {WATERMARK}; put a backup there, or move the folder away to have new "
            "ones made, with which nothing marked so far is recognised"
        ) from error


def _watermark_keys(path: Path) -> tuple[bytes, ...]:
    lines = _bytes(path).decode("ascii", "replace").split()
    try:
        found = tuple(bytes.fromhex(line) for line in lines)
    except ValueError:
        found = ()
    if not 0 < len(found) <= MAX_WATERMARK_KEYS or min(map(len, found)) < 16:
        raise MarksError(
            f"{path} needs 1 to {MAX_WATERMARK_KEYS} lines of 32 or more hexadecimal digits, the "
            "key that marks first, then older ones"
        )
    return found
