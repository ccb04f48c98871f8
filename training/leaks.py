"""Refuse a test on what was seen: the pictures, their patients and lesions, their near-duplicates.

A figure on pictures that a generator or classifier saw in training is worth nothing. Whoever trains
keeps an index of what it saw; whoever tests holds its test pictures against it.

    python -m training.data index datasets/train --out runs/lora/seen.npz
    python -m training.data leaks datasets/test --seen runs/lora/seen.npz

    >>> refuse(index(test_samples), seen(Path("runs/lora/seen.npz")), "the generator")
    Traceback (most recent call last):
    DatasetError: 2 of 585 test pictures were seen by the generator: ...
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import duplicates, thumbnails
from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Built, Index
from training import data
from training.data import Sample
from training.grouping import isic_number

LEARNT: Final = ("train", "val")
"""Splits that training uses: validation chooses steps, thresholds and temperatures."""
_LISTED: Final = 20


@dataclass(frozen=True)
class Leak:
    """A test picture, one that was seen, and why they are one; `similarity` 0: not compared."""

    test: str
    seen: str
    why: str
    similarity: float = 0.0


def index(samples: Sequence[Sample], threads: int = 2, shown: Any = iter) -> Index:
    """An index of samples. Names are their files' paths.

    Raises:
        DatasetError: a picture cannot be read: what is not looked at is not vouched for.
    """
    built = look([(one.file, one.group) for one in samples], threads, shown)
    if built.broken:
        name, reason = next(iter(built.broken.items()))
        raise DatasetError(
            f"{len(built.broken)} pictures cannot be read; the first, {name}: {reason}"
        )
    return built.index


def look(pictures: Sequence[tuple[Path, str]], threads: int = 2, shown: Any = iter) -> Built:
    """An index of files with their groups, and the files that cannot be read, with why."""
    # A group that is only the file's name would meet others of that name.
    listed = [
        (str(file), "" if file.name in (group, Path(group).name) else group, file)
        for file, group in pictures
    ]
    return thumbnails.build(listed, threads, shown)


def seen(path: Path, splits: Sequence[str] = LEARNT, threads: int = 2, shown: Any = iter) -> Index:
    """What was seen: a saved index, or a dataset's pictures in `splits`.

    Raises:
        DatasetError: it is neither, or has no picture there.
    """
    if path.is_file():
        return Index.load(path)
    samples = [sample for sample in data.read(path) if sample.split in splits]
    if not samples:
        raise DatasetError(f"{path} has no sample in splits {', '.join(splits)}")
    return index(samples, threads, shown)


def find(test: Index, seen: Index, threads: int = 2, shown: Any = iter) -> list[Leak]:
    """The test pictures that were seen, each with the first or the most similar that it is."""
    found: dict[int, Leak] = {}
    groups = {group: number for number, group in reversed(list(enumerate(seen.groups))) if group}
    numbers = {isic_number(name): number for number, name in enumerate(seen.names)}
    for number, (name, group) in enumerate(zip(test.names, test.groups, strict=True)):
        archive = isic_number(name)
        if archive and archive in numbers:
            other = seen.names[numbers[archive]]
            found[number] = Leak(name, other, f"both are {archive}")
        elif group in groups:
            found[number] = Leak(name, seen.names[groups[group]], f"both are of group {group}")
    for twin in duplicates.twins(test, seen, threads, shown):
        known = found.get(twin.one)
        # A known group or number says more than a likeness does.
        if known is None or 0 < known.similarity < twin.similarity:
            found[twin.one] = Leak(
                test.names[twin.one],
                seen.names[twin.other],
                "near-duplicates",
                round(twin.similarity, 3),
            )
    return [found[number] for number in sorted(found)]


def refuse(
    test: Index,
    seen: Index,
    by: str,
    threads: int = 2,
    shown: Any = iter,
    remedy: str = "take them out of the test",
) -> None:
    """Pass where no test picture was seen.

    Raises:
        DatasetError: some were; the message lists the pairs (the first twenty).
    """
    leaks = find(test, seen, threads, shown)
    if not leaks:
        return
    lines = [f"  {leak.test} = {leak.seen} ({reason(leak)})" for leak in leaks[:_LISTED]]
    if len(leaks) > _LISTED:
        lines.append(f"  and {len(leaks) - _LISTED} more")
    raise DatasetError(
        f"{len(leaks)} of {len(test)} test pictures were seen by {by}:\n"
        + "\n".join(lines)
        + f"\n{remedy}, or make the splits anew: python -m training.data split"
    )


def apart(samples: Sequence[Sample], leave_out: bool, threads: int = 2) -> list[Sample]:
    """Samples none of whose training or validation pictures stands in their test split too.

    Those that do are left out where `leave_out` says so, with all pictures of their lesions or
    patients; the test stays whole, so that its figures are of the same pictures.

    Raises:
        DatasetError: some do, and `leave_out` does not say so; the message lists them.
    """
    test = index([one for one in samples if one.split not in LEARNT], threads)
    learnt = [one for one in samples if one.split in LEARNT]
    known = index(learnt, threads)
    if not leave_out:
        refuse(test, known, "this training", threads, remedy="train without them: --leave-out")
        return list(samples)
    # A leak names one seen picture for a test picture; there may be more, so look again.
    dropped: set[str] = set()
    while leaks := find(test, known, threads):
        dropped |= kin(learnt, {leak.seen for leak in leaks})
        learnt = [one for one in learnt if str(one.file) not in dropped]
        known = index(learnt, threads)
    return [one for one in samples if str(one.file) not in dropped]


def kin(samples: Sequence[Sample], files: Collection[str]) -> set[str]:
    """`files` and those of the same lesions or patients: what shows one of them shows the others.

    A group is of its source: two sources may count their lesions alike.
    """
    groups = {(one.source, one.group) for one in samples if str(one.file) in files and _known(one)}
    return set(files) | {
        str(one.file) for one in samples if (one.source, one.group) in groups and _known(one)
    }


def _known(sample: Sample) -> bool:
    """Whether the group is more than the file's name, which other folders may have too."""
    return bool(sample.group) and sample.file.name not in (sample.group, Path(sample.group).name)


def reason(leak: Leak) -> str:
    """Why two pictures are one, in words."""
    return f"{leak.why}, {leak.similarity:.2f}" if leak.similarity else leak.why
