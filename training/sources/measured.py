"""Adapter for folders with a `metadata.csv` of measured attributes (`training.measured`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from training import measured
from training.sources.found import Found


def folder_of_measures(folder: Path) -> Iterator[Found]:
    """Rows as they are: label, attributes, group, split, source and licence are the table's."""
    for record in measured.read(folder):
        file, mask = folder / record.file_name, folder / record.mask if record.mask else None
        yield Found(
            file if file.is_file() else None,
            file.stem,
            record.label,
            group=record.group,
            split=record.split,
            confirmed=record.confirmed,
            age=record.age,
            sex=record.sex,
            site=record.site,
            mask=mask if mask is not None and mask.is_file() else None,
            modality="dermoscopic",
            source=record.source,
            licence=record.licence,
            attribution=record.source,
            words={
                "diagnosis": record.diagnosis,
                "asymmetry": record.asymmetry,
                "border": record.border,
                "colors": record.colors,
                "size": record.size,
                "structures": record.structures,
            },
        )
