"""A job's folder: what it is a job of, where its files lie, and that it is the same one resumed.

DIR/                     a dataset, once `metadata.jsonl` is there
  images/0000/*.png      what is kept
  __rejected__/0000/     what is not; loaders of image folders pass over such names
  .batch/                job.json, journals, temporary files
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import files
from dermaflux.errors import DatasetError
from serving.batch.items import Item
from serving.batch.journal import unlocked

IMAGES: Final = "images"
REJECTED: Final = "__rejected__"
_FORMAT: Final = 1
_HALF: Final = ".job.json."
_YOUNG_SECONDS: Final = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What must be the same whenever and wherever a job goes on.

    Engine, precision, threads and batch size may differ: they are told with each picture.
    `gate` has the thresholds, or is None; `seen` is the sha256 of the index of seen pictures.
    """

    bundle: str
    seed: int
    attempts: int
    gate: Mapping[str, Any] | None
    seen: str | None
    format: int = _FORMAT


class Folder:
    """The folder of a job; `share` names this process's part of it, such as `1-of-3`."""

    def __init__(self, path: Path, share: str) -> None:
        self.path = path
        self.machinery = path / ".batch"
        self.temporary = self.machinery / "tmp" / share
        self.share = share

    def prepare(self, job: Job) -> None:
        """Make the folder, or make sure that it is of this job.

        Raises:
            DatasetError: it is of another job, has other files, or cannot be written.
        """
        file = self.machinery / "job.json"
        try:
            if not file.exists():
                if self.path.exists() and any(self.path.iterdir()) and not self.machinery.exists():
                    raise DatasetError(
                        f"--out {self.path} has files that no job of this kind wrote; name a new "
                        "or an empty folder"
                    )
                self.machinery.mkdir(parents=True, exist_ok=True)
                _write_once(file, job)
            _check_same(file, job)
        except OSError as error:
            raise DatasetError(
                f"--out {self.path} cannot be used: {error.strerror or error}"
            ) from error

    def sweep(self) -> None:
        """Remove what a killed process left half written. Only who holds the journal may."""
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True, exist_ok=True)
        for left in self.machinery.glob(f"{_HALF}*"):
            # Another process may be at it just now: it is young then.
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _YOUNG_SECONDS:
                    left.unlink()

    def sweep_others(self) -> None:
        """The same for shares that nobody is at; for who finishes the job."""
        idle = set(unlocked(self.machinery)) - {self.share}
        for folder in (self.machinery / "tmp").glob("*"):
            if folder.name in idle:
                shutil.rmtree(folder, ignore_errors=True)

    def tell_engine(self, name: str, details: Mapping[str, Any]) -> None:
        """Keep what the hash of an engine stands for."""
        text = json.dumps(details, indent=2, sort_keys=True) + "\n"
        self.write(f".batch/engine-{name}.json", text.encode())

    def engines(self) -> dict[str, Any]:
        """Hash -> what it stands for, of all that drew for this job."""
        found: dict[str, Any] = {}
        for file in sorted(self.machinery.glob("engine-*.json")):
            name = file.stem.removeprefix("engine-")
            try:
                found[name] = dict(json.loads(file.read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s is damaged (%s): what drew is known by its hash alone", file, error)
                found[name] = {}
        return found

    def kept(self, item: Item) -> str:
        """Where an item's picture lies if it is kept, relative to the folder."""
        return f"{IMAGES}/{item.file}"

    def rejected(self, item: Item, attempt: int) -> str:
        """Where a rejected try of an item lies. Names hold no ~, so none is another's."""
        return f"{REJECTED}/{item.file.removesuffix('.png')}~{attempt}.png"

    def write(self, relative: str, data: bytes) -> None:
        """Write a file, whole or not at all; its folder is made.

        Raises:
            OSError: the disk is full or takes no files.
        """
        path = self.path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data, self.temporary)


def _write_once(file: Path, job: Job) -> None:
    """Write the job's file, unless another process was first."""
    content = json.dumps(asdict(job), indent=2, ensure_ascii=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=_HALF)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content.encode())
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(temporary, 0o644)
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:
        # Some network disks have no links: then the last of two at one moment is the job.
        os.replace(temporary, file)
    Path(temporary).unlink(missing_ok=True)


def _check_same(file: Path, job: Job) -> None:
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise DatasetError(f"{file} is damaged ({error}); begin anew in another --out") from None
    now = json.loads(json.dumps(asdict(job)))
    if not isinstance(before, dict) or before.keys() != now.keys():
        raise DatasetError(f"{file} is of another version; begin anew in another --out")
    told = {"seen": "the index of --seen", "seed": "--seed", "attempts": "--attempts",
            "gate": "the gate", "bundle": "the bundle", "format": "its form"}  # fmt: skip
    for name, value in now.items():
        if before[name] != value:
            raise DatasetError(
                f"{file.parent.parent} is a job with another value of {told[name]}: "
                f"{_short(before[name])} there, {_short(value)} now; go on with the former, or "
                "name another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "..."
