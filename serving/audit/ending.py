"""Where a log ends: its files, the last whole line, what a kill left behind it, and the head.

A log is a folder:

    audit-000001.jsonl, audit-000002.jsonl ...   lines; the chain goes on from file to file
    head.json                                    number and hash of the last line, sealed
    torn.jsonl                                   pieces of lines that a kill or a full disk cut off
    lock                                         held by who appends

The head tells a log whose end was cut off; whoever puts an older head there as well is told by the
anchors in the service's own log.

    >>> end = last_line(newest(folder), secrets)
    >>> end.n, end.hash
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serving.audit.record import LINE, MAX_LINE, ZERO, genuine, line_hash, stamp
from serving.audit.secret import AuditError, Secret, Secrets

_FILE: Final = re.compile(r"audit-(\d{6,})\.jsonl")
HEAD: Final = "head.json"
TORN: Final = "torn.jsonl"
_HEAD_BYTES: Final = 256
"""Of one length, so that writing it anew leaves nothing of the old one."""


@dataclass(frozen=True)
class End:
    """The last line: its number, hash and time; (0, ZERO) where there is none. `size` in bytes is
    where the whole lines of the file end, `torn` what stands behind."""

    n: int
    hash: str
    size: int
    torn: bytes = b""
    time: str = ""


@dataclass(frozen=True)
class Head:
    """What `head.json` says of the last line, and of the number of its file."""

    n: int
    hash: str
    file: int


def files_of(folder: Path) -> list[Path]:
    """The files of lines, in order."""
    found = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """The number of a file of lines; 0 where its name is no such."""
    found = _FILE.fullmatch(path.name)
    return int(found[1]) if found else 0


def file_of(folder: Path, number: int) -> Path:
    """The file of this number."""
    return folder / f"audit-{number:06d}.jsonl"


def last_line(path: Path, secrets: Secrets) -> End:
    """How a file of lines ends. Only its end is read.

    Raises:
        AuditError: the last whole line is none of ours, so that nothing can follow it.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        window = 2 * MAX_LINE
        while True:
            start = max(0, size - window)
            stream.seek(start)
            data = stream.read(size - start)
            whole = data.rfind(b"\n") + 1
            before = data.rfind(b"\n", 0, max(0, whole - 1)) + 1
            if start == 0 or (whole and before):
                break
            window *= 4
    torn = data[whole:]
    if not whole:
        return End(0, ZERO, 0, torn)
    line = data[before:whole]
    found = LINE.fullmatch(line)
    secret = secrets.known.get(found[6].decode()) if found else None
    if found is None or secret is None or not genuine(found, secret):
        why = "is none that was written here" if found is None or secret else (
            f"is sealed with the key {found[6].decode()}, which is not in the key file"
        )  # fmt: skip
        raise AuditError(
            f"the last line of {path} {why}, so nothing can be written behind it. Look with: "
            f"python -m serving.audit verify {path.parent} --key KEY; then take the key from the "
            f"backup, or keep the files elsewhere and begin a new log in an empty folder"
        )
    return End(int(found[2]), line_hash(line), start + whole, torn, found[4].decode())


def put_aside(folder: Path, path: Path, end: End) -> None:
    """Keep what a kill left of a line in `torn.jsonl`, on the disk, before it is cut off."""
    piece = {
        "time": stamp(),
        "file": path.name,
        "after": end.n,
        "sha256": hashlib.sha256(end.torn).hexdigest(),
        "base64": base64.b64encode(end.torn).decode(),
    }
    descriptor = os.open(folder / TORN, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        os.write(descriptor, json.dumps(piece).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def head_bytes(head: Head, secret: Secret) -> bytes:
    """The content of `head.json`."""
    body = f'{{"n":{head.n},"hash":"{head.hash}","file":{head.file},"key":"{secret.id}"'.encode()
    sealed = body + b',"mac":"' + secret.mac(body).encode() + b'"}'
    return sealed.ljust(_HEAD_BYTES - 1) + b"\n"


_HEAD: Final = re.compile(
    rb'(\{"n":(\d+),"hash":"([0-9a-f]{64})","file":(\d+),"key":"([0-9a-f]{8})"),'
    rb'"mac":"([0-9a-f]{64})"\} *\n'
)


def read_head(folder: Path, secrets: Secrets | None) -> Head | None:
    """What `head.json` says; None where there is none. Without secrets its seal is not looked at.

    Raises:
        AuditError: it is not what was written: edited, or cut off by a power failure.
        OSError: it cannot be read.
    """
    try:
        data = (folder / HEAD).read_bytes()
    except FileNotFoundError:
        return None
    found = _HEAD.fullmatch(data)
    secret = secrets.known.get(found[5].decode()) if found and secrets else None
    good = found is not None and (secrets is None or (secret is not None
            and secret.mac(found[1]).encode() == found[6]))  # fmt: skip
    if found is None or not good:
        raise AuditError(f"{folder / HEAD} is not what was written there")
    return Head(int(found[2]), found[3].decode(), int(found[4]))
