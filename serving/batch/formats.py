"""A dataset folder in two further forms: tar files for WebDataset, and a table in Parquet.

    >>> records = dataset.read(folder)
    >>> webdataset(folder, records, 1000)
    [PosixPath('generated/shards/000000.tar'), PosixPath('generated/shards/000001.tar')]
    >>> parquet(folder, records, embed=True)
    PosixPath('generated/dataset.parquet')

Both hold what `metadata.jsonl` says, read one picture at a time, and are there whole or not at all.
Each picture is compared with the sha256 of its record on the way: a damaged one is never passed on.
Equal datasets make equal bytes (Parquet: of one version of pyarrow).

The tar files are the standard library's, in the layout of https://github.com/webdataset/webdataset:
importing that package for its writer would import torch, where it is installed. The table is not
called metadata.parquet: Hugging Face's imagefolder refuses folders with that beside metadata.jsonl.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from dermaflux import files
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from dermaflux.prompt import LABELS

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

SHARDS: Final = "shards"
TABLE: Final = "dataset.parquet"
_IMAGE: Final = "image"
_LISTS: Final = ("colors", "structures")
_NUMBERS: Final = ("age",)
_ROWS: Final = 10_000
# A group of rows is in memory at once; Hugging Face's viewer wants as few where they hold pictures:
# https://huggingface.co/docs/hub/datasets-image
_ROWS_OF_PICTURES: Final = 100


def sweep(folder: Path) -> None:
    """Remove what a killed process left of both forms; what was put aside comes back."""
    whole, part, old = (folder / name for name in (SHARDS, f".{SHARDS}.part", f".{SHARDS}.old"))
    if old.exists() and not whole.exists():
        old.rename(whole)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    for file in folder.glob(f".{TABLE}.*"):
        file.unlink(missing_ok=True)


def webdataset(folder: Path, records: Sequence[Record], per_shard: int) -> list[Path]:
    """Write `shards/000000.tar`, ... with `per_shard` pictures each, the last with the rest.

    A sample's key is its picture's name without the suffix, dots in it as %2E (WebDataset ends keys
    at the first dot); its members are `cls` (0 benign, 1 malignant), `json` (the record's line),
    `txt` (the caption) and the picture under its own suffix. Samples keep the order of `records`.
    The folder replaces that of an earlier run, with all that was in it.

    Raises:
        DatasetError: a picture is missing or damaged, or two would have one key.
        OSError: the disk is full or takes no files; the former shards are as they were.
    """
    if per_shard < 1:
        raise ValueError(f"a shard needs at least one picture, not {per_shard}")
    keys = _keys(records)
    whole, part, old = (folder / name for name in (SHARDS, f".{SHARDS}.part", f".{SHARDS}.old"))
    with _naming(whole):
        sweep(folder)
        part.mkdir()
        try:
            names: list[str] = []
            for start in range(0, len(records), per_shard):
                names.append(f"{len(names):06d}.tar")
                with files.replacing(part / names[-1]) as stream:
                    part_of = slice(start, start + per_shard)
                    _write_tar(stream, folder, records[part_of], keys[part_of])
            if whole.exists():
                whole.rename(old)
            part.rename(whole)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            if old.exists() and not whole.exists():
                old.rename(whole)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return [whole / name for name in names]


def _write_tar(
    stream: Any, folder: Path, records: Sequence[Record], keys: Sequence[tuple[str, str]]
) -> None:
    # Equal bytes for equal datasets: no times, no owners, and members in the order of their names.
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for record, (key, suffix) in zip(records, keys, strict=True):
            sample = {
                "cls": str(LABELS.index(record.label)).encode(),
                "json": json.dumps(record.to_mapping(), ensure_ascii=False).encode(),
                "txt": record.text.encode(),
                suffix: _picture(folder, record),
            }
            for extension in sorted(sample):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(sample[extension])
                member.mode = 0o644
                tar.addfile(member, io.BytesIO(sample[extension]))


def _keys(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The key and the suffix of each record's sample."""
    keys = []
    for record in records:
        path = PurePosixPath(record.file_name)
        # A stem of its own may hold the sign that stands for a dot.
        key = path.stem.replace("%", "%25").replace(".", "%2E")
        suffix = path.suffix[1:].lower()
        if not suffix or suffix in ("cls", "json", "txt"):
            raise DatasetError(f"{record.file_name} needs a picture's suffix, such as .png")
        keys.append((key, suffix))
    twice = [key for key, count in Counter(key for key, _ in keys).items() if count > 1]
    if twice:
        same = [record.file_name for record, (key, _) in zip(records, keys, strict=True)
                if key == twice[0]]  # fmt: skip
        raise DatasetError(
            f"{same[0]} and {same[1]} would be one sample, {twice[0]}; give the pictures names of "
            "their own"
        )
    return keys


def parquet(folder: Path, records: Sequence[Record], embed: bool = False) -> Path:
    """Write `dataset.parquet`, a row a picture: the record's fields and its further keys.

    What is unknown is null, or an empty list. A further key is a column of booleans, whole numbers,
    numbers or texts where all its values are of that kind, else of JSON. `embed` adds `image`, the
    picture as Hugging Face's `datasets` holds it: its file's bytes and its path.

    Raises:
        DatasetError: pyarrow is not installed, a picture to embed is missing or damaged, or a
            further key is called `image` beside it.
        OSError: the disk is full or takes no files; a former table is as it was.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise DatasetError(
            f"Parquet needs pyarrow, which cannot be imported ({error}); pip install '.[formats]', "
            "or leave --parquet out"
        ) from error
    kinds = _kinds(records)
    if embed and _IMAGE in kinds:
        raise DatasetError(f"records have a key {_IMAGE!r}, as the embedded picture; rename it")
    schema = _schema(kinds, embed)
    path = folder / TABLE
    with _naming(path):
        sweep(folder)
        rest = iter(records)
        with files.replacing(path) as stream, pq.ParquetWriter(stream, schema) as writer:
            while group := list(islice(rest, _ROWS_OF_PICTURES if embed else _ROWS)):
                rows = [_row(folder, record, kinds, embed) for record in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return path


def _kinds(records: Sequence[Record]) -> dict[str, str]:
    """Further key -> what its column holds: a name of Hugging Face's types, or `json`."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.more.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                kinds.add(_kind(value))
    return {name: _common(kinds) for name, kinds in found.items()}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) and abs(value) < 1 << 63:
        return "int64" if abs(value) > 1 << 53 else "small"
    if isinstance(value, float):
        return "float64"
    return "string" if isinstance(value, str) else "json"


def _common(kinds: set[str]) -> str:
    if not kinds:
        return "string"
    if kinds <= {"small", "int64"}:
        return "int64"
    # Larger whole numbers would change when they become floating.
    if kinds == {"small", "float64"}:
        return "float64"
    return kinds.pop() if len(kinds) == 1 else "json"


def _schema(kinds: Mapping[str, str], embed: bool) -> pa.Schema:
    """Columns, and beside them Hugging Face's own description, by which it shows pictures."""
    import pyarrow as pa

    types = {name: "string" for name in Record.__dataclass_fields__ if name != "more"}
    types |= dict.fromkeys(_NUMBERS, "float64") | dict.fromkeys(_LISTS, "list")
    types |= {name: "string" if kind == "json" else kind for name, kind in kinds.items()}
    arrow = {
        "bool": pa.bool_(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "string": pa.string(),
        "list": pa.list_(pa.string()),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
    features: dict[str, Any] = {
        name: {"dtype": kind, "_type": "Value"} for name, kind in types.items()
    }
    # Sequence is what versions before 4 and after read alike.
    text = {"dtype": "string", "_type": "Value"}
    features |= {name: {"feature": text, "_type": "Sequence"} for name in _LISTS}
    if embed:
        types = {_IMAGE: "image"} | types
        features = {_IMAGE: {"_type": "Image"}} | features
    described = json.dumps({"info": {"features": features}}, ensure_ascii=False)
    return pa.schema(
        [(name, arrow[kind]) for name, kind in types.items()], {"huggingface": described}
    )


def _row(folder: Path, record: Record, kinds: Mapping[str, str], embed: bool) -> dict[str, Any]:
    row = dict.fromkeys(_LISTS, ()) | record.to_mapping()
    for name, kind in kinds.items():
        if kind == "json" and row.get(name) is not None:
            row[name] = json.dumps(row[name], ensure_ascii=False)
    if embed:
        row[_IMAGE] = {"bytes": _picture(folder, record), "path": record.file_name}
    return row


def _picture(folder: Path, record: Record) -> bytes:
    """A picture's file, if it is what its record says."""
    file = folder / record.file_name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
    found = hashlib.sha256(data).hexdigest()
    if record.sha256 and record.sha256 != found:
        raise DatasetError(
            f"{file} is damaged: its sha256 is {found}, its record has {record.sha256}; delete it "
            "and draw it again, or take its line out"
        )
    return data


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the system says while `path` is written names it; a full disk it says of no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
