"""Make, list, check and revoke API keys: `python -m serving.keys new --id ward3 --roles classify`.

`new` shows the key once, on stderr, and prints the line to keep on stdout, so that both of these do
the same; a service that uses the file takes the key within a second or two:

    python -m serving.keys new --id ward3 --roles classify,generate --days 365 --file keys.jsonl
    python -m serving.keys new --id ward3 --roles classify,generate --days 365 >> keys.jsonl

    python -m serving.keys list keys.jsonl
    python -m serving.keys check keys.jsonl         # of a key on stdin: whose, and what may it
    python -m serving.keys revoke keys.jsonl --id ward3

A key is never an argument: those are seen by everybody on the machine. The last line on stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from dermaflux.command import ended, names
from serving.keyring import MARK, ROLES, Entry, KeysError, Role, digest, parse, read

RANDOM_BYTES = 32
"""256 bits: as many as SHA-256 has, far more than anybody can try."""
PRIVATE = 0o600


def made(
    name: str, roles: Sequence[str], *, days: float | None = None, note: str = ""
) -> tuple[str, Entry]:
    """A new key and its entry.

    Raises:
        KeysError: the id, a role, the days or the note is not one that an entry takes.
    """
    for role in roles:
        if role not in ROLES:
            raise KeysError(f"the role {role!r} is not known; use {', '.join(ROLES)}")
    if days is not None and not 0 < days < 36_500:
        raise KeysError(f"a key is valid for more than 0 and less than 36500 days, not {days:g}")
    key = MARK + secrets.token_urlsafe(RANDOM_BYTES)
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        entry = Entry(
            id=name,
            sha256=digest(key),
            roles=cast(list[Role], list(roles)),
            created=now,
            expires=None if days is None else now + timedelta(days=days),
            note=note,
        )
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        raise KeysError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    return key, entry


def line(entry: Entry) -> str:
    """The entry as a line of a file, without its end."""
    return entry.model_dump_json(exclude_defaults=True)


def new(settings: argparse.Namespace) -> None:
    """Make a key; append its line to the file where one is named."""
    roles = names(settings.roles)
    key, entry = made(settings.id, roles, days=settings.days, note=settings.note)
    if settings.file is not None:
        with _changing(settings.file) as write:
            text = _text(settings.file)
            end = "" if not text or text.endswith("\n") else "\n"
            after = f"{text}{end}{line(entry)}\n"
            parse(after, str(settings.file))
            write(after)
    print(f"The key, shown this once: {key}", file=sys.stderr)
    print(line(entry))


def revoke(settings: argparse.Namespace) -> None:
    """Mark the key as revoked; its line stays, for the record."""
    with _changing(settings.file) as write:
        lines, found = _text(settings.file, needed=True).splitlines(), None
        parse("\n".join(lines), str(settings.file))
        for number, text in enumerate(lines):
            if not text.strip() or text.lstrip().startswith("#"):
                continue
            entry = Entry.model_validate_json(text)
            if entry.id == settings.id and entry.revoked is None:
                now = datetime.now(UTC).replace(microsecond=0)
                found = entry.model_copy(update={"revoked": now})
                lines[number] = line(found)
        if found is None:
            raise KeysError(
                f"{settings.file} has no key {settings.id!r} that is not revoked; see all with: "
                f"python -m serving.keys list {settings.file}"
            )
        write("\n".join(lines) + "\n")
    print(line(found))


def list_keys(settings: argparse.Namespace) -> None:
    """Print every entry without its hash, and whether its key is taken now."""
    now = datetime.now(UTC)
    entries, _ = read(settings.file)
    told = [{**json.loads(line(entry)), "state": _state(entry, now)} for entry in entries]
    for one in told:
        del one["sha256"]
        print(f"{one['id']}: {one['state']}, {','.join(one['roles'])}", file=sys.stderr)
    print(json.dumps({"keys": told}))


def check(settings: argparse.Namespace) -> int:
    """Say whose key comes on stdin and what it may; the status is 1 where it is not taken."""
    key = sys.stdin.readline().strip()
    entries, _ = read(settings.file)
    found = [entry for entry in entries if entry.sha256 == digest(key)]
    states = {_state(entry, datetime.now(UTC)): entry for entry in found}
    state = "valid" if "valid" in states else next(iter(states), "unknown")
    told: dict[str, Any] = {"state": state}
    if state in states:
        told |= {"id": states[state].id, "roles": states[state].roles}
    print(json.dumps(told))
    return 0 if state == "valid" else 1


def _state(entry: Entry, now: datetime) -> str:
    if entry.revoked is not None:
        return "revoked"
    return "valid" if entry.valid(now) else "expired"


def _text(path: Path, *, needed: bool = False) -> str:
    if not needed and not path.exists():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise KeysError(f"{path} cannot be read: {reason}") from None


@contextmanager
def _changing(path: Path) -> Iterator[Callable[[str], None]]:
    """What replaces the file whole, with nobody else of this command in between.

    Its mode, owner and group stay as they were; a new one is its owner's alone. The lock is held on
    the folder, since the file itself is another one afterwards.
    """

    def write(text: str) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                if path.exists():
                    before = path.stat()
                    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(stream.fileno(), before.st_uid, before.st_gid)
                    os.fchmod(stream.fileno(), before.st_mode & 0o777)
                else:
                    os.fchmod(stream.fileno(), PRIVATE)
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield write
    finally:
        os.close(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m serving.keys", description="API keys.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("new", help="make a key")
    one.add_argument("--id", required=True, help="who has it; goes into logs")
    one.add_argument("--roles", required=True, help=f"comma-separated, of {', '.join(ROLES)}")
    one.add_argument("--days", type=float, help="how long it is valid; for ever if not given")
    one.add_argument("--note", default="", help="for whoever reads the file")
    one.add_argument("--file", type=Path, help="append its line to this file")
    one.set_defaults(work=new)

    for name, work, text in (
        ("list", list_keys, "all keys of a file"),
        ("revoke", revoke, "take a key no more"),
        ("check", check, "whose key is on stdin"),
    ):
        one = commands.add_parser(name, help=text)
        one.add_argument("file", type=Path, help="the file of keys")
        if name == "revoke":
            one.add_argument("--id", required=True, help="whose key")
        one.set_defaults(work=work)
    settings = parser.parse_args(arguments)
    return ended(lambda: settings.work(settings))


if __name__ == "__main__":
    sys.exit(main())
