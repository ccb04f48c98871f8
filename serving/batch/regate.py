"""Another gate on pictures that are drawn: what would these thresholds have kept?

    python -m serving.batch.regate generated/night --gate strict.yaml --out generated/strict

All that a gate measured stands beside each picture, kept or rejected, so no picture is drawn or
looked at again: the recorded numbers are judged anew, and what passes becomes a dataset of its own.
What the first gate did not measure, the second cannot ask for. Near-duplicates are not looked for
again; those that the job found stay out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

from dermaflux import dataset, files
from dermaflux.command import ended, option, parsed
from dermaflux.dataset import METADATA, Record
from dermaflux.errors import DatasetError
from serving.batch.gate import reasons
from serving.batch.thresholds import OFF, Thresholds


@dataclass(frozen=True)
class Settings:
    """The settings of `python -m serving.batch.regate`."""

    folder: Path = option("a dataset that serving.batch wrote")
    out: Path = option("the new dataset's folder", MISSING, position=False)
    gate: Path = option("a YAML file of thresholds", MISSING, position=False)


def regate(folder: Path, gate: Thresholds, out: Path) -> dict[str, Any]:
    """Write the dataset of what passes; counts by label and by reason of what does not.

    Raises:
        DatasetError: `folder` is no such dataset, `out` is not empty, or a picture lacks a measure
            that the thresholds ask for.
    """
    if out.exists() and any(out.iterdir()):
        raise DatasetError(f"--out {out} is not empty; name a new folder")
    manifest = _manifest(folder)
    kept: list[Record] = []
    refused: Counter[str] = Counter()
    for record in dataset.read(folder):
        measures = record.more.get("measured")
        _check_measured(record, measures, gate)
        said = reasons(gate, record.lesion, dict(measures or {}))
        if said:
            refused[str(record.label)] += 1
            continue
        kept.append(record)
    if not kept:
        raise DatasetError("nothing passes these thresholds; ease them")
    for record in kept:
        _link(folder / record.file_name, out / record.file_name)
    result = {
        **manifest,
        "job": {**manifest.get("job", {}), "gate": asdict(gate)},
        "regated_from": {"folder": folder.name, "gate": manifest.get("job", {}).get("gate")},
        "kept": len(kept),
        "kept_by_label": dict(sorted(Counter(str(one.label) for one in kept).items())),
        "rejected": sum(refused.values()),
        "rejected_by_label": dict(sorted(refused.items())),
    }
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    with dataset.writing(out / "manifest.json"):
        files.write(out / "manifest.json", text.encode())
    dataset.write(out, kept)
    return {name: result[name] for name in ("kept", "kept_by_label", "rejected_by_label")}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{folder} is no dataset that serving.batch wrote: its manifest.json cannot be read "
            f"({error})"
        ) from error
    if not isinstance(content, dict) or not (folder / METADATA).is_file():
        raise DatasetError(f"{folder} is no finished job of serving.batch")
    return content


def _check_measured(record: Record, measures: object, gate: Thresholds) -> None:
    """Refuse to judge by what is not known."""
    there: Mapping[str, Any] = measures if isinstance(measures, dict) else {}
    for name, kind in _needed(gate):
        if not isinstance(there.get(name), kind):
            raise DatasetError(
                f"{record.file_name}: {name} was not measured (it is {there.get(name)!r}); draw "
                "with a gate that measures it, or turn its rule off"
            )


def _needed(gate: Thresholds) -> Iterator[tuple[str, type]]:
    if gate.agreement != OFF:
        yield "probability", float
        yield "decision", str
    if gate.attributes:
        yield "found", bool
        yield "shares", dict


def _link(source: Path, target: Path) -> None:
    """The same file in both folders where the disk can, else a copy."""
    with dataset.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(Settings, "python -m serving.batch.regate", str(__doc__), arguments)

    def work() -> None:
        found = regate(settings.folder, Thresholds.open(settings.gate), settings.out)
        print(json.dumps({"out": str(settings.out), **found}))

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
