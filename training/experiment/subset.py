"""The real subset of a size as a dataset of its own, to train a generator on nothing else.

>>> write_subset(config, 500, Path("runs/subset500"))
{'out': 'runs/subset500', 'pictures': 500, 'malignant': 95}
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from dermaflux import dataset, files
from dermaflux.errors import DatasetError
from training import data
from training.experiment.config import Config
from training.experiment.sets import Sets


def write_subset(config: Config, size: int, out: Path) -> dict[str, Any]:
    """Copy pictures and masks, and write `metadata.jsonl`; what it wrote.

    Raises:
        DatasetError: there are not that many, `out` holds a dataset, or cannot be written.
    """
    folder = Path(config.real)
    if (out / dataset.METADATA).exists():
        raise DatasetError(f"{out} is a dataset already; give --out another folder")
    if size < 2:
        raise DatasetError(f"--subset {size}: a number of real pictures, 2 or more")
    wanted = {sample.file for sample in Sets.read(replace(config, generators={})).subset(size)}
    records = [one for one in data.records(folder) if folder / one.file_name in wanted]
    for record in records:
        for name in filter(None, (record.file_name, record.mask)):
            file = out / PurePosixPath(name)
            with dataset.writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                files.write(file, (folder / name).read_bytes())
    dataset.write(out, records)
    return {
        "out": str(out),
        "pictures": len(records),
        "malignant": sum(one.label == "malignant" for one in records),
    }
