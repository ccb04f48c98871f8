"""Several datasets -> one: pictures linked or copied below the name of the folder they came from.

    python -m training.data merge datasets/isic2019 datasets/ddi --out datasets/all

Groups, splits and all else stay as they are; `split` on the result unites what the collections
share and makes new splits.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from training import data


def run(folders: Sequence[Path], out: Path, shown: Any = iter) -> dict[str, Any]:
    """Join datasets of either layout; returns the summary. An interrupted run is started again.

    Raises:
        DatasetError: two folders have one name, `out` holds a dataset, or a picture is missing.
    """
    names = [folder.resolve().name for folder in folders]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DatasetError(
            f"two folders are named {twice[0]}; rename one, for pictures go below it"
        )
    if (out / dataset.METADATA).exists():
        raise DatasetError(f"{out} holds a dataset already; give another --out, or remove it")
    everything = [(f, n, r) for f, n in zip(folders, names, strict=True) for r in data.records(f)]
    records = []
    for folder, name, record in shown(everything):
        # The whole path: a folder may hold both images/x.jpg and x.jpg.
        mask = f"masks/{name}/{record.mask}" if record.mask else None
        moved = replace(record, file_name=f"images/{name}/{record.file_name}", mask=mask)
        _bring(folder, record.file_name, out / moved.file_name)
        if record.mask and moved.mask:
            _bring(folder, record.mask, out / moved.mask)
        records.append(_own_group(moved, record, name))
    dataset.write(out, records)
    return {
        "out": str(out),
        "images": len(records),
        "labels": dict(Counter(record.label for record in records)),
        "sources": dict(Counter(record.source for record in records)),
        "licences": dict(Counter(record.licence for record in records)),
    }


def _own_group(moved: Record, record: Record, name: str) -> Record:
    """A group that was only the file's name would meet those of that name in other folders."""
    return replace(moved, group=f"{name} {record.group}" if record.group == record.file_name
                   else record.group)  # fmt: skip


def _bring(folder: Path, name: str, target: Path) -> None:
    """Link a file, or copy it where links cannot be made.

    What an interrupted run left stays where its content is the source's, and is replaced otherwise.
    """
    source = (folder / name).resolve()
    if not source.is_file():
        raise DatasetError(f"{folder / name} is missing; python -m training.data check {folder}")
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    with dataset.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:  # Another file system, or one without links.
            shutil.copyfile(source, part)
        part.replace(target)
