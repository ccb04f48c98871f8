"""A publisher's folder -> a dataset/: pictures checked and copied, labels mapped, one record each.

    python -m training.data import ham10000 HAM10000 --out datasets/ham10000 --size 512

A picture that cannot be decoded, or that the folder lacks, is listed and left out; the others
stand. What is done is noted in `import.jsonl` as it is done, so that an interrupted import goes on
where it was; `metadata.jsonl` is written last. The same command on a finished dataset adds what was
broken and is repaired; captions, splits and all else of the records that are there stay.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageOps

from dermaflux import dataset, files
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.thumbnails import UNREADABLE, why
from training import labels as label_map
from training.labels import Labels, Meaning
from training.sources.found import SUFFIXES, Found
from training.sources.table import Collection

PROGRESS: Final = "import.jsonl"
QUALITY: Final = 95
"""JPEG quality of shrunk pictures, 4:4:4: Pillow's documentation advises against more."""
LINKS: Final = ("copy", "hard", "symbolic")
_SHOWN: Final = 20


@dataclass(frozen=True)
class Plan:
    """How to import: shorter side in pixels (0: as it is), copies or links, one modality or all."""

    size: int = 0
    link: str = "copy"
    modality: str = ""
    threads: int = 2


def run(
    collection: Collection, folder: Path, out: Path, plan: Plan, labels: Labels, shown: Any = iter
) -> dict[str, Any]:
    """Import a collection; returns the summary: counts, exclusions with reasons, broken pictures.

    Where `out` holds this dataset already, its records stay as they are and `added` counts the new.

    Raises:
        DatasetError: the folder is not as published, a class is unknown, `out` holds something
            else or takes no files, or no picture is left.
    """
    found = list(collection.read(folder))
    meanings, excluded = _meanings(found, collection.name, plan, labels)
    if not meanings:
        raise DatasetError(f"{folder} has no picture to import: {dict(excluded) or 'it is empty'}")
    (out / "images").mkdir(parents=True, exist_ok=True)
    about = {
        "collection": collection.name, "folder": str(folder.resolve()), "size": plan.size,
        "link": plan.link, "modality": plan.modality, "label_map": labels.version,
    }  # fmt: skip
    with dataset.writing(out / PROGRESS):
        done = _progress(out, about)
    before = dataset.read(out) if (out / dataset.METADATA).exists() else []
    records: list[Record] = []
    broken: dict[str, str] = {}
    masks: list[str] = []
    with ThreadPoolExecutor(plan.threads) as pool:
        work = _ahead(pool, [one for one, _ in meanings], out, plan, done)
        for (one, meaning), result in zip(meanings, shown(work), strict=True):
            if one.name not in done:
                _note(out / PROGRESS, {"name": one.name, **result})
            if "broken" in result:
                broken[one.name] = result["broken"]
                continue
            if "broken_mask" in result:
                masks.append(one.name)
            records.append(_record(one, meaning, result, collection.name, labels))
    added = _added(before, records)
    records = before + added
    if not records:
        some = dict(sorted(broken.items())[:_SHOWN])
        raise DatasetError(f"{folder}: none of {len(meanings)} pictures can be read: {some}")
    if added:
        dataset.write(out, records)
    return {
        "out": str(out), "collection": collection.name, "label_map": labels.version,
        "images": len(records),
        "kept": len(before),
        "added": len(added),
        "labels": dict(Counter(record.label for record in records)),
        "splits": dict(Counter(record.split for record in records)),
        "groups": len({record.group for record in records}),
        "licences": dict(Counter(record.licence for record in records)),
        "excluded": dict(excluded),
        "broken": len(broken),
        "broken_images": dict(sorted(broken.items())[:_SHOWN]),
        "broken_masks": masks[:_SHOWN],
    }  # fmt: skip


def _meanings(
    found: list[Found], name: str, plan: Plan, labels: Labels
) -> tuple[list[tuple[Found, Meaning]], Counter[str]]:
    """The pictures to import with what their class means, and how many are left out and why."""
    kept, excluded = [], Counter[str]()
    seen: set[str] = set()
    for one in found:
        meaning = labels.of(name, one.kind, one.term, one.said)
        if meaning.label is None:
            excluded[f"{one.kind or 'no class'}: {meaning.reason}"] += 1
        elif plan.modality and one.modality != plan.modality:
            excluded[f"modality {one.modality or 'not given'}"] += 1
        elif one.name in seen:
            excluded["a second row of the same picture"] += 1
        else:
            seen.add(one.name)
            kept.append((one, meaning))
    return kept, excluded


def _added(before: list[Record], records: list[Record]) -> list[Record]:
    """The records that a dataset does not have yet.

    One whose patient or lesion is there already joins its group and its split: others may have been
    made since.
    """
    there = {record.file_name for record in before}
    groups = {record.group: record.group for record in before}
    groups |= {str(r.more["source_group"]): r.group for r in before if "source_group" in r.more}
    splits: dict[str, set[str]] = {}
    for record in before:
        splits.setdefault(record.group, set()).add(record.split)
    added = []
    for record in records:
        if record.file_name in there:
            continue
        group = groups.get(record.group, record.group)
        if len(found := splits.get(group, set())) == 1:
            record = replace(record, group=group, split=next(iter(found)))  # noqa: PLW2901
        added.append(record)
    return added


def _note(file: Path, note: dict[str, Any]) -> None:
    """A line more. The file is opened for each, so that a full disk is told of here."""
    with dataset.writing(file), file.open("a", encoding="utf-8") as notes:
        notes.write(json.dumps(note) + "\n")


def _progress(out: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an interrupted import with the same settings had done, by the pictures' names."""
    file = out / PROGRESS
    if not file.is_file():
        if (out / dataset.METADATA).exists():
            raise DatasetError(f"{out} holds a dataset already; give another --out, or remove it")
        files.write(file, (json.dumps(about) + "\n").encode())
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")
    try:
        before = json.loads(lines[0])
        if not isinstance(before, dict):
            raise ValueError(f"it begins with {lines[0][:40]}")
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{file} is not the note of an import ({error}); remove {out}"
        ) from error
    if before != about:
        names = [name for name in about if before.get(name) != about[name]]
        raise DatasetError(
            f"{out} was begun with another {names[0] if names else 'import'} "
            f"({before.get(names[0]) if names else before}); give another --out, or remove it"
        )
    done: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            note = json.loads(line) if line else None
        except json.JSONDecodeError:
            # The last line may be half: the process was killed while it wrote. Cut it off.
            files.write(file, ("\n".join(lines[: number - 1]) + "\n").encode())
            break
        # Pictures that were missing or broken may have come or been repaired since.
        if note and "broken" not in note:
            done[note.pop("name")] = note
    return done


def _ahead(
    pool: ThreadPoolExecutor, found: list[Found], out: Path, plan: Plan,
    done: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The results in order, a few pictures ahead of who asks."""
    waiting: deque[Future[dict[str, Any]]] = deque()
    for one in found:
        waiting.append(pool.submit(_bring, one, out, plan, done.get(one.name)))
        if len(waiting) > 8 * plan.threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _bring(one: Found, out: Path, plan: Plan, done: dict[str, Any] | None) -> dict[str, Any]:
    """Copy one picture and its mask; the note of it, or why it is left out."""
    if done is not None and (out / done["file_name"]).is_file():
        return done
    if one.file is None:
        return {"broken": "the metadata names it, the folder lacks it"}
    try:
        # A name that is not UTF-8 cannot be written into a record.
        one.name.encode()
        data = one.file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            small = _shrunk(image, plan.size)
    except UNREADABLE as error:
        return {"broken": why(error).replace(str(one.file), one.file.name)}
    # The publisher's name may hold anything; only its last part names our file.
    stem = one.name.replace("/", "_").replace("\\", "_")
    if small is not None:
        file_name, data = f"images/{stem}.jpg", _jpeg(small)
        _write(out / file_name, data)
    else:
        suffix = one.file.suffix.lower()
        file_name = f"images/{stem}{suffix if suffix in SUFFIXES else '.jpg'}"
        _place(one.file, out / file_name, plan.link, data)
    note = {"file_name": file_name, "sha256": hashlib.sha256(data).hexdigest()}
    if one.mask is not None:
        try:
            note["mask"] = _mask(one.mask, stem, out, small.size if small is not None else None)
        except UNREADABLE as error:
            note["broken_mask"] = why(error).replace(str(one.mask), one.mask.name)
    return note


def _shrunk(image: Image.Image, size: int) -> Image.Image | None:
    """The picture with `size` as its shorter side (Lanczos), or None where it is small already."""
    if not size or min(image.size) <= size:
        return None
    upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = size / min(upright.size)
    width, height = (max(size, round(side * scale)) for side in upright.size)
    return upright.resize((width, height), Image.Resampling.LANCZOS)


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def _place(source: Path, target: Path, link: str, data: bytes) -> None:
    if link == "copy":
        _write(target, data)
        return
    with dataset.writing(target):
        target.unlink(missing_ok=True)
        if link == "symbolic":
            target.symlink_to(source.resolve())
            return
    try:
        os.link(source.resolve(), target)
    except OSError:  # Another file system, or one without links.
        _write(target, data)


def _write(target: Path, data: bytes) -> None:
    """Whole or not at all where the process dies; not flushed, for that takes hours for 400,000.

    After a power failure `check` compares the checksums.
    """
    part = target.with_name(f".{target.name}.part")
    with dataset.writing(target):
        try:
            part.write_bytes(data)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        part.replace(target)


def _mask(source: Path, stem: str, out: Path, size: tuple[int, int] | None) -> str:
    name = f"masks/{stem}.png"
    with dataset.writing(out / "masks"):
        (out / "masks").mkdir(exist_ok=True)
    with Image.open(source) as image:
        mask = image.convert("L")
    stream = io.BytesIO()
    (mask.resize(size, Image.Resampling.NEAREST) if size else mask).save(stream, "PNG")
    _write(out / name, stream.getvalue())
    return name


def _record(
    one: Found, meaning: Meaning, note: dict[str, Any], name: str, labels: Labels
) -> Record:
    about = labels.about(name)
    words = {key: value for key, value in one.words.items() if value}
    more = {"label_map": labels.version, "collection": name, "class": one.kind, **one.more}
    if one.modality:
        more["modality"] = one.modality
    return Record(
        file_name=note["file_name"],
        label=str(meaning.label),
        **({"diagnosis": meaning.diagnosis} | words),
        split=one.split,
        # Only the archive's names are the same picture in every collection.
        group=one.group or (one.name if one.name.startswith("ISIC_") else f"{name} {one.name}"),
        source=one.source or about["name"],
        licence=one.licence or about["licence"],
        attribution=one.attribution or about["attribution"],
        confirmed=one.confirmed,
        age=one.age,
        sex=one.sex,
        site=one.site,
        skin_type=one.skin_type,
        mask=note.get("mask"),
        sha256=note["sha256"],
        more=more,
    )


def labels_of(file: Path | None) -> Labels:
    """The map of labels in `file`, or our own."""
    return label_map.read(file or label_map.FILE)
