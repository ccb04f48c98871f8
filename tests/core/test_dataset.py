"""The dataset/ contract: what is written is read; what is wrong is named with its line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError

FULL = Record(
    "images/ä b.jpg", "malignant", "text", "melanoma", "asymmetric", "irregular",
    ("black", "dark brown"), "large", ("streaks",), "test", "p 7", "HIBA", "CC-BY-4.0", "Hospital",
    "histo", 61.5, "female", "back", "V-VI", "masks/a.png", "0" * 64, {"label_map": "labels-1"},
)  # fmt: skip


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [FULL, Record("a.png", "benign")]
    dataset.write(tmp_path, records)
    assert dataset.read(tmp_path) == records
    assert [file.name for file in tmp_path.iterdir()] == [dataset.METADATA]
    first = (tmp_path / dataset.METADATA).read_bytes()
    dataset.write(tmp_path, dataset.read(tmp_path))
    assert (tmp_path / dataset.METADATA).read_bytes() == first


def test_what_is_unknown_is_left_out_of_the_line() -> None:
    assert Record("a.png", "benign").to_mapping() == {
        "file_name": "a.png", "label": "benign", "split": "train", "group": "a.png",
    }  # fmt: skip


def test_keys_of_others_survive() -> None:
    row = {"file_name": "a.png", "label": "benign", "seed": 7, "model": {"name": "mini"}}
    assert row.items() <= Record.from_mapping(row).to_mapping().items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file_name": "../a.png"}, "no path inside"),
        ({"file_name": "/a.png"}, "no path inside"),
        ({"mask": "..\\a.png"}, "no path inside"),
        ({"split": "holdout"}, "'holdout' is not known; use train, val, test"),
        ({"sex": "F"}, "'F' is not known"),
        ({"age": -1}, "age -1"),
        ({"age": float("nan")}, "age nan"),
        ({"age": True}, "age True"),
        ({"group": 7}, "group needs a text"),
        ({"skin_type": 3}, "skin_type needs a text"),
        ({"diagnosis": "melanoma"}, "melanoma.*benign"),
        ({"colors": "black"}, "list of words"),
        ({"label": None}, "no label"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    good = {"file_name": "a.png", "label": "benign"}
    lines = [json.dumps(good | {"file_name": "b.png"}), "", json.dumps(good | change)]
    (tmp_path / dataset.METADATA).write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=rf"line 3: .*{said}"):
        dataset.read(tmp_path)


def test_a_picture_named_twice_is_refused(tmp_path: Path) -> None:
    dataset.write(tmp_path, [Record("a.png", "benign"), Record("a.png", "malignant")])
    with pytest.raises(DatasetError, match=r"line 2: a\.png was named by line 1"):
        dataset.read(tmp_path)


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no metadata\.jsonl; make one"):
        dataset.read(tmp_path)
    (tmp_path / dataset.METADATA).write_text("\n")
    with pytest.raises(DatasetError, match="is empty"):
        dataset.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["text", "group", "source", "attribution", "site", "file_name", "mask", "other"]
)
def test_half_a_character_is_refused_before_it_is_written(tmp_path: Path, name: str) -> None:
    row = {"file_name": "a.png", "label": "benign"} | {name: "half \ud83d"}
    (tmp_path / dataset.METADATA).write_text(json.dumps(row) + "\n")
    with pytest.raises(DatasetError, match=r"line 1: .*holds '\\ud83d', half of a character"):
        dataset.read(tmp_path)


def test_whole_characters_of_two_halves_pass(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "label": "benign", "text": "\U0001f600", "other": "\U0001f600"}
    (tmp_path / dataset.METADATA).write_text(json.dumps(row) + "\n")
    assert dataset.read(tmp_path)[0].text == "\U0001f600"


def test_json_nested_too_deeply_is_named_with_its_line(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    row = f'{{"file_name": "a.png", "label": "benign", "x": {deep}}}'
    (tmp_path / dataset.METADATA).write_text(row + "\n")
    with pytest.raises(DatasetError, match="line 1: .*too deeply"):
        dataset.read(tmp_path)


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.write(tmp_path, [FULL])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DatasetError, match=r"metadata\.jsonl cannot be written: No space left"):
        dataset.write(tmp_path, [Record("a.png", "benign")])
    assert dataset.read(tmp_path) == [FULL]
