"""Look at an audit log: does it hold, what came last, a table of a span of time; and make its key.

    python -m serving.audit verify audit --key keys/audit.key --anchors service.log
    python -m serving.audit tail audit -n 5
    python -m serving.audit export audit --from 2026-01-01 --to 2026-02-01 --out january.csv
    python -m serving.audit key keys/audit.key       # one more key, which seals from the next start

Status: 0 the log holds, 1 it does not, 2 it cannot be read. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from dermaflux import files as atomic
from dermaflux.command import ended
from serving.audit import secret
from serving.audit.anchors import logged_anchors
from serving.audit.ending import files_of
from serving.audit.record import LINE, MAX_LINE, stamp
from serving.audit.secret import AuditError, Secrets
from serving.audit.verifying import verify

COLUMNS: Final = (
    *("n", "time", "event", "caller", "route", "outcome", "status", "bundle", "results"),
    *("request", "address", "note", "key", "prev", "mac"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; its exit status."""
    options = _parser().parse_args(arguments)
    return ended(lambda: int(options.run(options)))


def check(options: argparse.Namespace) -> int:
    """`verify`: every fault with its line, notes, and a summary."""
    secrets = Secrets.open(options.key) if options.key else None
    anchors = [*options.anchor]
    for log in options.anchors:
        anchors += logged_anchors(log)
    found = verify(_listed(options.files), secrets, anchors)
    for fault in found.faults:
        print(f"fail {fault}")
    if found.count > len(found.faults):
        print(f"fail and {found.count - len(found.faults)} more")
    for note in found.notes:
        print(f"note {note}")
    if secrets is None:
        print("note without --key nobody can tell whether the whole was written anew")
    summary = {"holds": found.holds, **asdict(found), "anchors": len(anchors)}
    del summary["faults"], summary["notes"]
    print(json.dumps(summary))
    return 0 if found.holds else 1


def tail(options: argparse.Namespace) -> int:
    """`tail`: the last lines, as they are."""
    last: deque[bytes] = deque(maxlen=max(0, options.lines))
    # The last two files are enough, unless more lines are asked for than they have.
    listed, take = _listed(options.files), 2
    while True:
        last.clear()
        for file in listed[-take:]:
            with file.open("rb") as stream:
                last.extend(stream)
        if len(last) >= options.lines or take >= len(listed):
            break
        take *= 2
    for line in last:
        print(line.decode("utf-8", "replace").rstrip("\n"))
    return 0


def export(options: argparse.Namespace) -> int:
    """`export`: lines of a span of time as CSV. It is refused where a line is none of a log."""
    begin, end = _moment(options.begin), _moment(options.end)
    count = 0
    with atomic.replacing(options.out) as stream:
        import io

        text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        for row in _rows(_listed(options.files)):
            if (not begin or row["time"] >= begin) and (not end or row["time"] < end):
                table.writerow({name: _cell(row.get(name, "")) for name in COLUMNS})
                count += 1
        text.detach()
    print(json.dumps({"file": str(options.out), "lines": count}))
    return 0


def key(options: argparse.Namespace) -> int:
    """`key`: append a new key to a file."""
    made = secret.add(options.file)
    print(json.dumps({"file": str(options.file), "key": made.id}))
    return 0


def _listed(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those of the folders named."""
    found = list(itertools.chain.from_iterable(
        files_of(path) if path.is_dir() else [path] for path in paths
    ))  # fmt: skip
    if not found:
        raise AuditError(f"{', '.join(map(str, paths))} has no audit-NNNNNN.jsonl")
    return found


def _rows(listed: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in listed:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), 1):
                if not LINE.fullmatch(line):
                    raise AuditError(
                        f"{file}, line {number} is no line of an audit log; look with: "
                        f"python -m serving.audit verify {file}"
                    )
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise AuditError(f"{file}, line {number} is no JSON: {error}") from None


def _cell(value: Any) -> str:
    """A value as a cell; none begins as a formula does, for spreadsheets run those."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _moment(text: str | None) -> str:
    """A day or moment of ISO 8601, UTC unless it says otherwise, in the form of the lines."""
    if text is None:
        return ""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise AuditError(f"{text!r} is no time; it needs a form such as 2026-01-31T09:00") from None
    return stamp(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.audit", description="Look at an audit log, or make its key."
    )
    commands = parser.add_subparsers(required=True, metavar="verify|tail|export|key")
    logs = argparse.ArgumentParser(add_help=False)
    logs.add_argument("files", nargs="+", type=Path, help="a log's folder, or files of it in order")

    one = commands.add_parser("verify", parents=[logs], help="tell what was edited, cut or moved")
    one.add_argument("--key", type=Path, help="the key file; without it seals are not looked at")
    one.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="[N:]HASH",
        help="a line that has to be there",
    )
    one.add_argument(
        "--anchors", action="append", default=[], type=Path, metavar="LOG",
        help="a log of the service, whose anchors have to be there",
    )  # fmt: skip
    one.set_defaults(run=check)

    one = commands.add_parser("tail", parents=[logs], help="the last lines")
    one.add_argument("-n", "--lines", type=int, default=10, help="how many; default: 10")
    one.set_defaults(run=tail)

    one = commands.add_parser("export", parents=[logs], help="lines of a span of time as CSV")
    one.add_argument("--from", dest="begin", help="from this day or moment on (UTC)")
    one.add_argument("--to", dest="end", help="before this day or moment (UTC)")
    one.add_argument("--out", type=Path, required=True, help="the table, which is replaced")
    one.set_defaults(run=export)

    one = commands.add_parser("key", help="append a new key to a key file, made if need be")
    one.add_argument("file", type=Path)
    one.set_defaults(run=key)
    return parser


if __name__ == "__main__":
    sys.exit(main())
