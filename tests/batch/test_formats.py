"""Further forms of a dataset: what is written is read again, equal, whole, and never damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from serving.batch import formats

MORE: list[dict[str, Any]] = [
    {"seed": 7, "synthetic": True, "guidance": 3, "measured": {"size": "large"}, "mixed": 1},
    {"seed": 2**53 - 1, "synthetic": False, "guidance": 3.5, "measured": {}, "mixed": "one"},
    {"seed": 0, "synthetic": True, "big": 2**62, "huge": 2**80, "unknown": None, "mixed": None},
]


def write(folder: Path, stems: list[str] | None = None) -> list[Record]:
    """A dataset of small pictures, each of its own grey."""
    records = []
    for number, stem in enumerate(stems or [f"{number:07d}" for number in range(5)]):
        name = f"images/{number // 2:04d}/{stem}.png"
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (number, number, number)).save(data, "PNG")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.getvalue())
        records.append(
            Record(
                file_name=name,
                label=("benign", "malignant")[number % 2],
                text=f"caption {number}, ä",
                colors=("black", "dark brown")[: number % 3],
                age=None if number else 40,
                sha256=hashlib.sha256(data.getvalue()).hexdigest(),
                more=MORE[number % len(MORE)],
            )
        )
    dataset.write(folder, records)
    return dataset.read(folder)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def samples(paths: list[Path]) -> list[dict[str, Any]]:
    return list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))


class TestWebDataset:
    def test_its_own_reader_finds_every_sample(self, tmp_path: Path) -> None:
        records = write(tmp_path)
        paths = formats.webdataset(tmp_path, records, 2)
        assert [str(path.relative_to(tmp_path)) for path in paths] == [
            "shards/000000.tar", "shards/000001.tar", "shards/000002.tar",
        ]  # fmt: skip
        assert [len(samples([path])) for path in paths] == [2, 2, 1]
        for record, sample in zip(records, samples(paths), strict=True):
            assert sample["__key__"] == Path(record.file_name).stem
            assert sample["png"] == (tmp_path / record.file_name).read_bytes()
            assert Record.from_mapping(json.loads(sample["json"])) == record
            assert sample["txt"].decode() == record.text
            assert sample["cls"] == str(int(record.label == "malignant")).encode()

    def test_equal_datasets_make_equal_bytes(self, tmp_path: Path) -> None:
        for name, when in (("a", 1), ("b", 2_000_000_000)):
            records = write(tmp_path / name)
            for record in records:
                os.utime(tmp_path / name / record.file_name, (when, when))
            formats.webdataset(tmp_path / name, records, 2)
        assert content(tmp_path / "a") == content(tmp_path / "b")
        with tarfile.open(tmp_path / "a/shards/000000.tar") as tar:
            for member in tar:
                owner = (member.uid, member.gid, member.uname, member.gname)
                assert (member.mtime, owner) == (0, (0, 0, "", ""))

    def test_dots_and_other_letters_in_names_keep_samples_apart(self, tmp_path: Path) -> None:
        stems = ["a.1", "a.2", "a%2E1", "ä " + "x" * 120, "a"]
        records = write(tmp_path, stems)
        found = samples(formats.webdataset(tmp_path, records, 10))
        assert [set(one) >= {"png", "json", "cls", "txt"} for one in found] == [True] * 5
        assert [one["__key__"] for one in found] == ["a%2E1", "a%2E2", "a%252E1", stems[3], "a"]
        assert len({one["png"] for one in found}) == 5

    def test_pictures_of_one_name_are_refused(self, tmp_path: Path) -> None:
        records = write(tmp_path, ["a", "b", "a"])
        with pytest.raises(DatasetError, match=r"images/0000/a.png and images/0001/a.png would"):
            formats.webdataset(tmp_path, records, 2)

    def test_an_earlier_run_leaves_nothing(self, tmp_path: Path) -> None:
        records = write(tmp_path)
        formats.webdataset(tmp_path, records, 1)
        for left in (".shards.part", ".shards.old"):
            (tmp_path / left).mkdir()
            (tmp_path / left / "000009.tar").write_bytes(b"half")
        paths = formats.webdataset(tmp_path, records[:3], 2)
        assert sorted((tmp_path / "shards").iterdir()) == paths
        assert not list(tmp_path.glob(".shards*"))


class TestParquet:
    def test_columns_are_typed_and_rows_are_the_records(self, tmp_path: Path) -> None:
        records = write(tmp_path)
        path = formats.parquet(tmp_path, records)
        assert path == tmp_path / "dataset.parquet"
        types = {field.name: str(field.type) for field in pq.read_schema(path)}
        assert {types[name] for name in ("file_name", "label", "text", "mask")} == {"string"}
        assert types["colors"] == types["structures"] == "list<element: string>"
        kinds = ("seed", "synthetic", "guidance", "big", "age", "measured", "mixed", "huge")
        assert [types[name] for name in kinds] == [
            "int64", "bool", "double", "int64", "double", "string", "string", "string",
        ]  # fmt: skip
        rows = pq.read_table(path).to_pylist()
        assert [json.loads(row["mixed"]) if row["mixed"] else None for row in rows] == [
            1, "one", None, 1, "one",
        ]  # fmt: skip
        for row, record in zip(rows, records, strict=True):
            for name in ("measured", "mixed", "huge"):
                row[name] = json.loads(row[name]) if row[name] else None
            known = {name: value for name, value in row.items() if value is not None}
            more = {name: value for name, value in record.more.items() if value is not None}
            assert Record.from_mapping(known) == replace(record, more=more)

    def test_pictures_go_along_as_hugging_face_has_them(self, tmp_path: Path) -> None:
        records = write(tmp_path)
        path = formats.parquet(tmp_path, records, embed=True)
        for row, record in zip(pq.read_table(path).to_pylist(), records, strict=True):
            data = (tmp_path / record.file_name).read_bytes()
            assert row["image"] == {"bytes": data, "path": record.file_name}
        schema = pq.read_schema(path)
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == schema.names
        assert features["image"] == {"_type": "Image"}

    def test_few_pictures_are_in_memory_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(formats, "_ROWS_OF_PICTURES", 2)
        monkeypatch.setattr(formats, "_ROWS", 4)
        records = write(tmp_path)
        plain = pq.ParquetFile(formats.parquet(tmp_path, records))
        assert [plain.metadata.row_group(n).num_rows for n in range(2)] == [4, 1]
        full = pq.ParquetFile(formats.parquet(tmp_path, records, embed=True))
        assert [full.metadata.row_group(n).num_rows for n in range(3)] == [2, 2, 1]

    def test_equal_datasets_make_equal_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            formats.parquet(tmp_path / name, write(tmp_path / name), embed=True)
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_an_earlier_run_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / ".dataset.parquet.x7").write_bytes(b"half")
        formats.parquet(tmp_path, write(tmp_path))
        assert not list(tmp_path.glob(".*"))

    def test_a_key_that_is_called_as_the_picture_is_refused(self, tmp_path: Path) -> None:
        records = [replace(one, more={"image": 1}) for one in write(tmp_path)]
        with pytest.raises(DatasetError, match="key 'image'"):
            formats.parquet(tmp_path, records, embed=True)
        assert pq.read_table(formats.parquet(tmp_path, records))["image"].to_pylist() == [1] * 5

    def test_a_missing_library_is_named_with_what_installs_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DatasetError, match=re.escape("pip install '.[formats]'")):
            formats.parquet(tmp_path, write(tmp_path))


WRITERS: list[Callable[[Path, list[Record]], object]] = [
    lambda folder, records: formats.webdataset(folder, records, 2),
    lambda folder, records: formats.parquet(folder, records, embed=True),
]


@pytest.mark.parametrize("writer", WRITERS, ids=["webdataset", "parquet"])
class TestBoth:
    def test_a_damaged_picture_is_refused_by_name(
        self, tmp_path: Path, writer: Callable[[Path, list[Record]], object]
    ) -> None:
        records = write(tmp_path)
        writer(tmp_path, records)
        file = tmp_path / records[3].file_name
        file.write_bytes(file.read_bytes()[:-1])
        before = content(tmp_path)
        with pytest.raises(DatasetError, match=r"0000003\.png is damaged: its sha256 is"):
            writer(tmp_path, records)
        file.unlink()
        with pytest.raises(DatasetError, match=r"0000003\.png cannot be read: No such file"):
            writer(tmp_path, records)
        del before[records[3].file_name]
        assert content(tmp_path) == before

    def test_a_record_without_sha256_is_taken_as_it_is(
        self, tmp_path: Path, writer: Callable[[Path, list[Record]], object]
    ) -> None:
        before = content(tmp_path).keys()
        writer(tmp_path, [replace(record, sha256="") for record in write(tmp_path)])
        assert content(tmp_path).keys() > before

    @pytest.mark.parametrize("earlier", [False, True])
    def test_a_full_disk_leaves_no_half_file(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        writer: Callable[[Path, list[Record]], object],
        earlier: bool,
    ) -> None:
        records = write(tmp_path)
        if earlier:
            writer(tmp_path, records[:1])
        before = content(tmp_path)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            writer(tmp_path, records)
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value.filename)
        assert content(tmp_path) == before


def test_no_library_is_imported_before_it_is_needed() -> None:
    import subprocess

    code = (
        "import sys, serving.batch.formats; "
        "print({'pyarrow', 'webdataset', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
