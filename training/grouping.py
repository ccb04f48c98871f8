"""Which pictures belong together, and splits that never divide them.

Pictures are one group where their patient or lesion is, where they are the same file, where the
ISIC Archive gives them one number (collections share pictures), and where they are near-duplicates.

    >>> grouped, twins = regrouped(folder, records)
    >>> split(grouped, val=0.1, test=0.2, seed=0)
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dermaflux import duplicates, thumbnails
from dermaflux.dataset import Record
from dermaflux.duplicates import Twin
from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Index

_ISIC: Final = re.compile(r"ISIC_\d{7}")


def isic_number(name: str) -> str:
    """The ISIC Archive's name of a picture in a file's name, or nothing."""
    match = _ISIC.search(Path(name).name)
    return match.group() if match else ""


def index(
    folder: Path, records: Iterable[Record], threads: int = 2, shown: Any = iter
) -> thumbnails.Built:
    """The pictures of records, to know their copies by. Names are the records' `file_name`."""
    listed = ((one.file_name, one.group, folder / one.file_name) for one in records)
    return thumbnails.build(listed, threads, shown)


def same(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Pairs of records that are one file or one picture of the ISIC Archive."""
    first: dict[str, int] = {}
    pairs = []
    for number, record in enumerate(records):
        for mark in (record.sha256, isic_number(record.file_name)):
            if mark and first.setdefault(mark, number) != number:
                pairs.append((first[mark], number))
    return pairs


def regrouped(records: Sequence[Record], seen: Index, twins: Iterable[Twin]) -> list[Record]:
    """The records with the groups of all that are one picture united.

    `seen` is their index, which may lack some. A group that changed stays in `more` as
    `source_group`.
    """
    place = {record.file_name: number for number, record in enumerate(records)}
    pairs = [(place[seen.names[one.one]], place[seen.names[one.other]]) for one in twins]
    groups = duplicates.united([one.group for one in records], [*same(records), *pairs])
    return [
        record
        if record.group == group
        else replace(record, group=group, more={**{"source_group": record.group}, **record.more})
        for record, group in zip(records, groups, strict=True)
    ]


def split(records: Sequence[Record], val: float, test: float, seed: int) -> list[Record]:
    """The records with new splits, alike in source and label, that divide no group.

    A group's order is the hash of its name and the seed: what was in the test split stays there
    when other groups are added, but for a few at the edge.

    Raises:
        DatasetError: the shares leave nothing to train on, or there are too few groups.
    """
    check(val, test)
    members: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        members[record.group].append(record)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group, inside in members.items():
        labels = {record.label for record in inside}
        strata[inside[0].source, "malignant" if "malignant" in labels else "benign"].append(group)
    chosen: dict[str, str] = {}
    for groups in strata.values():
        total = sum(len(members[group]) for group in groups)
        counts: Counter[str] = Counter()
        ordered = sorted(groups, key=lambda group: _order(group, seed))
        for group in ordered:
            size = len(members[group])
            for name, share in (("test", test), ("val", val)):
                # Half of a group may stand over, so that large ones find a place.
                if counts[name] + size / 2 <= share * total:
                    chosen[group] = name
                    break
            counts[chosen.setdefault(group, "train")] += size
    result = [replace(record, split=chosen[record.group]) for record in records]
    have = {record.split for record in result}
    wanted = ["train", *(["val"] if val else []), *(["test"] if test else [])]
    if lacking := [name for name in wanted if name not in have]:
        raise DatasetError(
            f"{len(members)} groups are too few for a split {lacking[0]} of that share; "
            "give larger shares or more data"
        )
    return result


def check(val: float, test: float) -> None:
    """Refuse shares of splits that cannot be, before pictures are compared for hours.

    Raises:
        DatasetError: they leave nothing to train on.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise DatasetError(f"val {val} and test {test} leave nothing to train on; give less than 1")


def divided(records: Iterable[Record]) -> dict[str, list[str]]:
    """The groups that stand in several splits, with these splits."""
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        splits[record.group].add(record.split)
    return {group: sorted(names) for group, names in splits.items() if len(names) > 1}


def _order(group: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()
