"""A settled job into a dataset: copies out, lists of what is missing, and `metadata.jsonl` last.

Done again from the journals whenever a job was gone on with, so it may be killed at any moment.
Near-duplicates are judged here, over all shares of the job and in the order of its items, so that
it does not matter who drew what when: the first of two that are one stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dermaflux import __version__, dataset
from dermaflux.bundle import Bundle
from dermaflux.dataset import METADATA, Record
from serving.batch import copies, formats
from serving.batch.gate import Thresholds
from serving.batch.items import Bad, Item
from serving.batch.job import IMAGES, Folder, Job
from serving.batch.journal import Entry, Ledger, read
from serving.batch.listing import Outcome, manifest_of, record, terms_of, write_lists
from serving.batch.resume import forget_missing, is_there, tries, unsettled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forms:
    """Further forms of the dataset: tar files of so many pictures, a table, pictures in it."""

    webdataset: int | None = None
    parquet: bool = False
    embed: bool = False

    def write(self, folder: Path, records: list[Record]) -> None:
        """Write them, or remove what an earlier run wrote where nothing is kept."""
        if self.webdataset is not None and records:
            formats.webdataset(folder, records, self.webdataset)
        elif not records:
            shutil.rmtree(folder / formats.SHARDS, ignore_errors=True)
        if self.parquet and records:
            formats.parquet(folder, records, self.embed)
        elif not records:
            (folder / formats.TABLE).unlink(missing_ok=True)

    def are_in(self, folder: Path) -> bool:
        """Whether all of them are there."""
        wanted = ((self.webdataset, formats.SHARDS), (self.parquet, formats.TABLE))
        return all((folder / name).exists() for asked, name in wanted if asked)

    def with_former(self, former: Mapping[str, Any]) -> Forms:
        """What is asked for now, and what an earlier run wrote: it would else contradict."""
        count = former.get("webdataset")
        return Forms(
            self.webdataset or (count if isinstance(count, int) else None),
            self.parquet or bool(former.get("parquet")),
            self.embed or bool(former.get("embed")),
        )


def finish(
    folder: Folder,
    job: Job,
    bundle: Bundle,
    items: Sequence[Item],
    bad: Sequence[Bad],
    forms: Forms,
    *,
    threads: int = 2,
    shown: Callable[[Iterable[Any]], Iterator[Any]] = iter,
) -> dict[str, Any] | int:
    """The manifest of what a job has come to, written with the dataset; or how many are unsettled.

    Nothing is done where it was done before. `shown` wraps the long loops: it may show progress,
    and may raise what ends them.

    Raises:
        DatasetError: the folder takes no files, or the disk is full.
    """
    with _alone(folder.machinery / "finish.lock"):
        ledger = read(folder.machinery)
        forget_missing(folder, items, ledger)
        if others := unsettled(items, ledger, job.attempts):
            return others
        folder.sweep_others()
        former = _object(folder.machinery / "finished.json")
        forms = forms.with_former(former.get("forms", {}))
        state = _state(items, bad, ledger, forms)
        manifest = _object(folder.path / "manifest.json")
        there = (folder.path / METADATA).exists() == bool(manifest.get("kept"))
        if former.get("state") == state and manifest and there and forms.are_in(folder.path):
            return manifest
        # Present means complete, and from here on pictures move.
        _note(folder, "", forms)
        (folder.path / METADATA).unlink(missing_ok=True)
        outcome = _sorted(folder, job, items, ledger, threads, shown)
        terms = terms_of(bundle)
        write_lists(folder, outcome, bad)
        formats.sweep(folder.path)
        if forms.webdataset is not None or forms.parquet:
            # Both want all records at once; the lines below are written one by one.
            listed = [record(folder, item, entry, bundle, terms) for item, entry in outcome.kept]
            forms.write(folder.path, listed)
            del listed
        manifest = manifest_of(folder, job, bundle, terms, items, outcome, bad)
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with dataset.writing(folder.path / "manifest.json"):
            folder.write("manifest.json", text.encode())
        if outcome.kept:
            lines = (record(folder, item, entry, bundle, terms) for item, entry in outcome.kept)
            dataset.write(folder.path, lines, folder.temporary)
        _note(folder, state, forms)
    _tell_strays(folder, items)
    return manifest


def _sorted(
    folder: Folder, job: Job, items: Sequence[Item], ledger: Ledger, threads: int,
    shown: Callable[[Iterable[Any]], Iterator[Any]],
) -> Outcome:  # fmt: skip
    """Items by outcome, with their pictures where they belong."""
    good = [(item, ledger.kept[item.name]) for item in items if item.name in ledger.kept]
    paths = {item.name: _where(folder, item, entry) for item, entry in good}
    copied: dict[str, str] = {}
    threshold = None if job.gate is None else Thresholds(**job.gate).copies
    if threshold is not None:
        # Whoever gives the seeds may want one lesion in several descriptions.
        drawn = [(item.name, paths[item.name]) for item, _ in good if not item.fixed]
        found = copies.find(drawn, threshold, threads, shown)
        copied = {
            name: f"it is {other} again (similarity {alike:.2f}; copies are from {threshold:g} on)"
            for name, (other, alike) in found.items()
        }
    kept: list[tuple[Item, Entry]] = []
    rejected: list[tuple[Item, Entry]] = []
    for item, entry in good:
        wanted = folder.rejected(item, entry.attempt) if item.name in copied else folder.kept(item)
        _move(paths[item.name], folder.path / wanted)
        (rejected if item.name in copied else kept).append((item, entry))
    for item in items:
        before = ledger.rejected.get(item.name, {})
        rejected += [(item, before[attempt]) for attempt in sorted(before)]
    failed = [
        (item, ledger.failed[item.name])
        for item in items
        if ledger.has_failed(item.name, tries(item, job.attempts))
    ]
    rejected.sort(key=lambda one: (one[0].index, one[1].attempt))
    return Outcome(kept, rejected, failed, copied)


def _where(folder: Folder, item: Item, entry: Entry) -> Path:
    """Where a kept picture lies: among the others, or put aside as a copy by an earlier run."""
    path = folder.path / folder.kept(item)
    return path if is_there(path, entry) else folder.path / folder.rejected(item, entry.attempt)


def _move(path: Path, wanted: Path) -> None:
    if path != wanted:
        with dataset.writing(wanted):
            wanted.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, wanted)


def _note(folder: Folder, state: str, forms: Forms) -> None:
    """Keep what is finished, or, with an empty state, what is about to be."""
    text = json.dumps({"state": state, "forms": asdict(forms)}) + "\n"
    with dataset.writing(folder.machinery / "finished.json"):
        folder.write(".batch/finished.json", text.encode())


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no whole one."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(items: Sequence[Item], bad: Sequence[Bad], ledger: Ledger, forms: Forms) -> str:
    """A hash of all that a finished dataset follows from."""
    digest = hashlib.sha256(f"{__version__} {forms} {bad}".encode())
    for item in items:
        digest.update(f"{item.name} {item.index} {item.digest}".encode())
        entries = [*ledger.rejected.get(item.name, {}).values()]
        entries += [one[item.name] for one in (ledger.kept, ledger.failed) if item.name in one]
        for entry in entries:
            digest.update(f"{entry.attempt} {entry.state} {entry.sha256} {entry.time}".encode())
    return digest.hexdigest()[:16]


def _tell_strays(folder: Folder, items: Sequence[Item]) -> None:
    known = {folder.kept(item) for item in items}
    there = (folder.path / IMAGES).rglob("*.png")
    strays = [one for one in there if one.relative_to(folder.path).as_posix() not in known]
    if strays:
        log.warning(
            "%d pictures that are not asked for any more, such as %s, are in %s and not in the "
            "dataset", len(strays), strays[0].name, folder.path / IMAGES,
        )  # fmt: skip


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time: two shares may end together, and both would finish."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s)", lock, error.strerror)
        yield
