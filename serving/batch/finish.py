"""A settled job into a dataset: copies out, lists of what is missing, and `metadata.jsonl` last.

Done again from the journals whenever a job was gone on with, so it may be killed at any moment.
Near-duplicates are judged here, over all shares of the job and in the order of its items, so that
it does not matter who drew what when: the first of two that are one stays.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermaflux import __version__, dataset, licence
from dermaflux.bundle import Bundle
from dermaflux.dataset import METADATA, Record
from dermaflux.images import NOTICE
from serving.batch import copies
from serving.batch.gate import Thresholds
from serving.batch.items import Bad, Item
from serving.batch.job import Folder, Job
from serving.batch.journal import Entry, Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Every item of a job by what became of it; `copied` names what it is a copy of, and how."""

    kept: list[tuple[Item, Entry]]
    rejected: list[tuple[Item, Entry]]
    failed: list[tuple[Item, Entry]]
    copied: dict[str, str]


def unsettled(items: Sequence[Item], ledger: Ledger, attempts: int) -> int:
    """How many items nobody has settled yet; one that failed is settled until the next run."""
    return sum(
        item.name not in ledger.failed and ledger.next_attempt(item.name, tries(item, attempts))
        is not None
        for item in items
    )  # fmt: skip


def tries(item: Item, attempts: int) -> int:
    """How many tries an item may have: one, where its seed was given."""
    return 1 if item.fixed else attempts


def finish(
    folder: Folder,
    job: Job,
    bundle: Bundle,
    items: Sequence[Item],
    bad: Sequence[Bad],
    ledger: Ledger,
    threads: int = 2,
    formats: Callable[[list[Record]], None] | None = None,
) -> Outcome:
    """Write what a settled job has come to. `formats` writes further forms of the same dataset.

    Raises:
        DatasetError: the folder takes no files, or the disk is full.
    """
    with _alone(folder.machinery / "finish.lock"):
        outcome = _sorted(folder, job, items, ledger, threads)
        terms = _terms(bundle)
        records = [record(folder, item, entry, bundle, terms) for item, entry in outcome.kept]
        _write_lists(folder, outcome, bad)
        if formats is not None and records:
            formats(records)
        manifest = _manifest(folder, job, bundle, terms, outcome, bad, len(items))
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        with dataset.writing(folder.path / "manifest.json"):
            folder.write("manifest.json", text.encode())
        if records:
            dataset.write(folder.path, records, folder.temporary)
        else:
            (folder.path / METADATA).unlink(missing_ok=True)
    return outcome


def record(
    folder: Folder, item: Item, entry: Entry, bundle: Bundle, terms: Mapping[str, str]
) -> Record:
    """An item's line in the dataset."""
    known = {name: item.more[name] for name in item.more if name in Record.__dataclass_fields__}
    more = {name: value for name, value in item.more.items() if name not in known}
    request = item.request
    return Record(
        file_name=folder.kept(item),
        text=request.prompt,
        **vars(item.lesion),
        # Of one bundle, an equal request with an equal seed is the same lesion.
        group=f"{bundle.id}-{item.digest}-{entry.attempt}",
        source=terms["source"],
        licence=terms["licence"],
        attribution=terms["attribution"],
        confirmed="synthetic",
        sha256=entry.sha256,
        **known,
        more={
            **more,
            "synthetic": True,
            "id": item.name,
            "seed": entry.seed,
            "attempt": entry.attempt,
            "steps": request.steps,
            "guidance": request.guidance,
            "height": request.height,
            "width": request.width,
            "bundle": bundle.id,
            "engine": entry.engine,
            "pixels_sha256": entry.pixels,
            "created": entry.time,
            "measured": dict(entry.measures),
        },
    )


def _sorted(
    folder: Folder, job: Job, items: Sequence[Item], ledger: Ledger, threads: int
) -> Outcome:
    """Items by outcome, with their pictures where they belong."""
    good = [(item, ledger.kept[item.name]) for item in items if item.name in ledger.kept]
    paths = {item.name: _where(folder, item, entry) for item, entry in good}
    copied: dict[str, str] = {}
    threshold = None if job.gate is None else Thresholds(**job.gate).copies
    if threshold is not None:
        # Whoever gives the seeds may want one lesion in several descriptions.
        drawn = [(item.name, paths[item.name]) for item, _ in good if not item.fixed]
        found = copies.find(drawn, threshold, threads)
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
    failed = [(item, ledger.failed[item.name]) for item in items if item.name in ledger.failed]
    rejected.sort(key=lambda one: (one[0].index, one[1].attempt))
    return Outcome(kept, rejected, failed, copied)


def _where(folder: Folder, item: Item, entry: Entry) -> Path:
    """Where a kept picture lies: among the others, or put aside as a copy by an earlier run."""
    path = folder.path / folder.kept(item)
    return path if path.exists() else folder.path / folder.rejected(item, entry.attempt)


def _move(path: Path, wanted: Path) -> None:
    if path != wanted:
        with dataset.writing(wanted):
            wanted.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, wanted)


def _write_lists(folder: Folder, outcome: Outcome, bad: Sequence[Bad]) -> None:
    rejected = [
        {
            "id": item.name,
            "attempt": entry.attempt,
            "file": folder.rejected(item, entry.attempt),
            "reasons": [*entry.reasons, *_listed(outcome.copied, item, entry)],
            "text": item.request.prompt,
            "label": item.lesion.label,
            "seed": entry.seed,
            "measured": dict(entry.measures),
        }
        for item, entry in outcome.rejected
    ]
    failed: list[dict[str, Any]] = [{"line": one.line, "reason": one.reason} for one in bad]
    failed += [
        {"id": item.name, "reason": "; ".join(entry.reasons), "text": item.request.prompt}
        for item, entry in outcome.failed
    ]
    for name, lines in (("rejected.jsonl", rejected), ("failed.jsonl", failed)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with dataset.writing(folder.path / name):
            folder.write(name, text.encode())


def _listed(copied: Mapping[str, str], item: Item, entry: Entry) -> list[str]:
    return [copied[item.name]] if entry.state == "kept" else []


def _terms(bundle: Bundle) -> dict[str, str]:
    """Source, licence and attribution of what a bundle draws.

    The classifier's ingredients do not count: it chooses among pictures, and is in none of them.
    """
    listed = [
        one
        for one in bundle.provenance.get("ingredients", ())
        if one.get("used_for", "") != "classifier"
    ]
    known = licence.combined(licence.Ingredient.of(one) for one in listed)
    return {
        "source": f"DermaFlux, bundle {bundle.name}",
        "licence": known.licence or str(bundle.provenance.get("licence") or ""),
        "attribution": "; ".join(known.attributions),
    }


def _manifest(
    folder: Folder, job: Job, bundle: Bundle, terms: Mapping[str, str], outcome: Outcome,
    bad: Sequence[Bad], asked: int,
) -> dict[str, Any]:  # fmt: skip
    drew = Counter(entry.engine for _, entry in outcome.kept)
    engines = {name: {"kept": drew[name], **details} for name, details in folder.engines().items()}
    return {
        "notice": NOTICE,
        "made_by": f"dermaflux {__version__}",
        "job": {
            "seed": job.seed, "attempts": job.attempts, "gate": job.gate, "seen": job.seen,
        },
        "bundle": {"id": bundle.id, "name": bundle.name, "wording": bundle.wording},
        "engines": engines,
        **terms,
        "ingredients": [dict(one) for one in bundle.provenance.get("ingredients", ())],
        "asked": asked,
        "kept": len(outcome.kept),
        "kept_by_label": _by_label(outcome.kept),
        "rejected": len(outcome.rejected),
        "rejected_by_label": _by_label(outcome.rejected),
        "copies": len(outcome.copied),
        "failed": len(outcome.failed),
        "bad_lines": len(bad),
    }  # fmt: skip


def _by_label(listed: Sequence[tuple[Item, Entry]]) -> dict[str, int]:
    return dict(sorted(Counter(str(item.lesion.label) for item, _ in listed).items()))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time: two shares may end together, and both would finish."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s)", lock, error.strerror)
        yield
