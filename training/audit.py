"""Is a dataset what it says? Counts, licences, label map, broken pictures, checksums, leaks.

python -m training.data check datasets/ham10000
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from PIL import Image

from dermaflux import duplicates
from dermaflux.dataset import Record
from dermaflux.thumbnails import UNREADABLE
from training import data, grouping

_SHOWN: Final = 20


def run(
    folder: Path, compare: bool = True, threads: int = 2, shown: Any = iter
) -> tuple[dict[str, Any], list[str]]:
    """The report on a dataset, and what is wrong with it in sentences (none: all is well).

    `compare` looks for near-duplicates too. Wrong are pictures that are missing, broken or of
    another checksum, groups in several splits, near-duplicates in several splits or with different
    labels, and a picture that two records name.

    Raises:
        DatasetError: it is no dataset.
    """
    records = data.records(folder)
    with ThreadPoolExecutor(threads) as pool:
        states = list(shown(pool.map(lambda record: _state(folder, record), records)))
    bad = {
        kind: [r.file_name for r, state in zip(records, states, strict=True) if state == kind]
        for kind in ("missing", "broken", "changed")
    }
    divided = grouping.divided(records)
    wrong = [
        f"{len(names)} pictures are {words}, such as {names[0]}"
        for (kind, names), words in zip(
            bad.items(),
            ("missing", "broken", "not those that were imported (another sha256)"),
            strict=True,
        )
        if names
    ]
    if divided:
        group, splits = next(iter(divided.items()))
        wrong.append(
            f"{len(divided)} groups stand in several splits, such as {group} in "
            f"{' and '.join(splits)}; make new ones with python -m training.data split"
        )
    report: dict[str, Any] = {
        "dataset": str(folder),
        "images": len(records),
        "groups": len({record.group for record in records}),
        "labels": _counts(record.label for record in records),
        "diagnoses": _counts(record.diagnosis or "not given" for record in records),
        "splits": {
            name: _counts(record.label for record in records if record.split == name)
            for name in sorted({record.split for record in records})
        },
        "sources": _counts(record.source for record in records),
        "licences": _counts(record.licence or "not given" for record in records),
        "confirmed": _counts(record.confirmed or "not given" for record in records),
        "label_maps": _counts(str(record.more.get("label_map", "none")) for record in records),
        "mapping": _counts(
            f"{record.more.get('collection')} {record.more['class']} -> {record.label}"
            for record in records
            if "class" in record.more
        ),
        "without_checksum": sum(not record.sha256 for record in records),
        "missing": len(bad["missing"]),
        "broken": len(bad["broken"]),
        "changed": len(bad["changed"]),
        "bad_images": [name for names in bad.values() for name in names][:_SHOWN],
        "divided_groups": len(divided),
    }
    if compare:
        twins, sentences = _compared(folder, records, threads, shown)
        report |= twins
        wrong += sentences
    return report | {"wrong": wrong}, wrong


def _compared(
    folder: Path, records: list[Record], threads: int, shown: Any
) -> tuple[dict[str, Any], list[str]]:
    """Counts of near-duplicates, and what is wrong about them."""
    index = grouping.index(folder, records, threads).index
    place = {record.file_name: record for record in records}
    pairs = [
        (place[index.names[twin.one]], place[index.names[twin.other]], twin.similarity)
        for twin in duplicates.twins(index, threads=threads, shown=shown)
    ]
    pairs += [(records[a], records[b], 1.0) for a, b in grouping.same(records)]
    apart = [pair for pair in pairs if pair[0].split != pair[1].split]
    unlike = [pair for pair in pairs if pair[0].label != pair[1].label]
    wrong = []
    for found, words in ((apart, "stand in different splits"), (unlike, "have different labels")):
        if found:
            one, other, value = found[0]
            wrong.append(
                f"{len(found)} near-duplicates {words}, such as {one.file_name} and "
                f"{other.file_name} ({value:.2f})"
            )
    return {
        "near_duplicates": len(pairs),
        "near_duplicates_of_other_groups": sum(a.group != b.group for a, b, _ in pairs),
        "near_duplicates_across_splits": len(apart),
        "near_duplicates_with_other_label": len(unlike),
        "examples": [
            [one.file_name, other.file_name, round(value, 3)]
            for one, other, value in (apart + unlike)[:_SHOWN]
        ],
    }, wrong


def _state(folder: Path, record: Record) -> str:
    """`missing`, `broken`, `changed`, or nothing where the picture is as its record says."""
    try:
        content = (folder / record.file_name).read_bytes()
    except OSError:
        return "missing"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
        if record.mask is not None:
            with Image.open(folder / record.mask) as image:
                image.load()
    except UNREADABLE:
        return "broken"
    if record.sha256 and hashlib.sha256(content).hexdigest() != record.sha256:
        return "changed"
    return ""


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
