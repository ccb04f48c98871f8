"""What a finished job says of itself: lines of the dataset, lists of what is missing, manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dermaflux import __version__, dataset, licence
from dermaflux.bundle import Bundle
from dermaflux.dataset import Record
from dermaflux.images import NOTICE
from serving.batch.items import Bad, Item
from serving.batch.job import Folder, Job
from serving.batch.journal import Entry


@dataclass(frozen=True)
class Outcome:
    """Every item of a job by what became of it; `copied` names what it is a copy of, and how."""

    kept: list[tuple[Item, Entry]]
    rejected: list[tuple[Item, Entry]]
    failed: list[tuple[Item, Entry]]
    copied: dict[str, str]


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
            "measured": json.loads(entry.measures),
        },
    )


def write_lists(folder: Folder, outcome: Outcome, bad: Sequence[Bad]) -> None:
    rejected = [
        {
            "id": item.name,
            "attempt": entry.attempt,
            "file": folder.rejected(item, entry.attempt),
            "reasons": [*entry.reasons, *_listed(outcome.copied, item, entry)],
            "text": item.request.prompt,
            "label": item.lesion.label,
            "seed": entry.seed,
            "measured": json.loads(entry.measures),
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


def terms_of(bundle: Bundle) -> dict[str, str]:
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


def manifest_of(
    folder: Folder, job: Job, bundle: Bundle, terms: Mapping[str, str], items: Sequence[Item],
    outcome: Outcome, bad: Sequence[Bad],
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
        "asked": len(items),
        "asked_by_label": _labels(items),
        "kept": len(outcome.kept),
        "kept_by_label": _labels(item for item, _ in outcome.kept),
        "rejected": len(outcome.rejected),
        "rejected_by_label": _labels(item for item, _ in outcome.rejected),
        "copies": len(outcome.copied),
        "failed": len(outcome.failed),
        "bad_lines": len(bad),
    }  # fmt: skip


def _labels(items: Iterable[Item]) -> dict[str, int]:
    return dict(sorted(Counter(str(item.lesion.label) for item in items).items()))
