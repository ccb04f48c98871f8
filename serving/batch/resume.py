"""What a job that goes on still has to draw: the journals held against requests and files.

>>> check_same(items, ledger)
>>> forget_missing(folder, items, ledger)
>>> left = list(remaining(items, ledger, attempts=1, seed=0))
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dermaflux.bundle import sha256
from dermaflux.errors import DatasetError
from serving.batch.items import Item
from serving.batch.job import Folder
from serving.batch.journal import Entry, Ledger
from serving.batch.maker import Try

log = logging.getLogger(__name__)


def tries(item: Item, attempts: int) -> int:
    """How many tries an item may have: one, where its seed was given."""
    return 1 if item.fixed else attempts


def unsettled(items: Iterable[Item], ledger: Ledger, attempts: int) -> int:
    """How many items nobody has settled yet; one that failed is settled until the next run."""
    return sum(
        item.name not in ledger.failed
        and ledger.next_attempt(item.name, tries(item, attempts)) is not None
        for item in items
    )


def check_same(items: Sequence[Item], ledger: Ledger) -> None:
    """Refuse items that were drawn of another request.

    Raises:
        DatasetError: the first such item.
    """
    for item in items:
        known = [ledger.kept.get(item.name), *ledger.rejected.get(item.name, {}).values()]
        if any(entry is not None and entry.asked != item.digest for entry in known):
            raise DatasetError(
                f"the picture {item.name!r} was drawn of another request than it has now; give it "
                "a new id (of a plan: change nothing of it), or name another --out"
            )


def forget_missing(
    folder: Folder, items: Sequence[Item], ledger: Ledger, verify: bool = False
) -> None:
    """Take out of the ledger whose picture is not there, or, with `verify`, is not what it was."""
    gone = 0
    for item in items:
        entries = [*ledger.rejected.get(item.name, {}).values()]
        entries += [ledger.kept[item.name]] if item.name in ledger.kept else []
        for entry in entries:
            places = {folder.path / entry.file, folder.path / folder.rejected(item, entry.attempt)}
            if not any(is_there(path, entry, verify) for path in places):
                ledger.forget(entry)
                gone += 1
    if gone:
        log.warning("%d pictures are missing or damaged, and are drawn again", gone)


def remaining(items: Sequence[Item], ledger: Ledger, attempts: int, seed: int) -> Iterator[Try]:
    """The next try of every item that is not settled; those that failed before come last."""
    for again in (False, True):
        for item in items:
            if (item.name in ledger.failed) is again:
                number = ledger.next_attempt(item.name, tries(item, attempts))
                if number is not None:
                    yield Try(item, number, item.attempt(number, seed))


def is_there(path: Path, entry: Entry, verify: bool = False) -> bool:
    """Whether a file is that of an entry: by its size, and with `verify` by its sha256."""
    try:
        same_size = path.stat().st_size == entry.size
    except OSError:
        return False
    return same_size and (not verify or sha256(path) == entry.sha256)
