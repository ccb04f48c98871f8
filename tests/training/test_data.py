from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import data

HEADER = (
    "image,mask,label,diagnosis,split,group,asymmetry_word,border_word,color_words,size_word,"
    "t2_globules,source,license,dx_type\n"
)


def test_the_projects_own_layout(dataset: Path) -> None:
    samples = data.read(dataset, "train")
    assert len(samples) == 8
    assert samples[1].lesion.label == "malignant"
    assert samples[1].lesion.colors == ("dark brown",)
    assert data.load_images(samples, 64).shape == (8, 64, 64, 3)
    assert data.licences(samples) == [("drawn", "CC0-1.0")]


def test_a_table_of_measured_attributes(tmp_path: Path) -> None:
    row = (
        "a.jpg,,benign,melanocytic nevus,train,g,slightly asymmetric,irregular border,"
        '"light brown, black",reaches the image edge,1.0,S,CC0,histo\n'
    )
    (tmp_path / "metadata.csv").write_text(HEADER + row)
    (sample,) = data.read(tmp_path)
    assert sample.lesion.diagnosis == "nevus"
    assert sample.lesion.border == "irregular"
    assert sample.lesion.colors == ("light brown", "black")
    assert sample.lesion.size == "edge"
    assert sample.lesion.structures == ("globules",)
    assert sample.confirmed == "histo"
    assert sample.mask is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"label": "benign"}, "line 1.*file_name"),
        ({"file_name": "a.png", "label": "odd"}, "line 1.*'odd' is not known"),
        ({"file_name": "a.png", "label": "benign", "size": 3}, "line 1.*needs a word"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, content: dict[str, object], said: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(content) + "\n")
    with pytest.raises(data.DatasetError, match=said):
        data.read(tmp_path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": \n')
    with pytest.raises(data.DatasetError, match="line 1"):
        data.read(tmp_path)


def test_no_dataset_and_no_split(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(data.DatasetError, match=r"metadata\.jsonl"):
        data.read(tmp_path)
    with pytest.raises(data.DatasetError, match="'night'"):
        data.read(dataset, "night")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "benign"}\n')
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(data.DatasetError, match=r"a\.png"):
        data.load_images(data.read(tmp_path), 32)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b'["a.png"]\n', "line 1: needs an object"),
        ("metadata.jsonl", b'{"file_name": "\xff"}\n', "not UTF-8"),
        ("metadata.csv", b"image,label,diagnosis\na.png,benign\n", "line 2: ends after 2 fields"),
    ],
)
def test_metadata_of_another_kind_is_said(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DatasetError, match=said):
        data.read(tmp_path)


def test_a_record_is_a_sample_with_mask_and_confirmation(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "label": "benign", "mask": "m.png", "confirmed": "histo",
           "group": "p", "attribution": "A"}  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = data.read(tmp_path)
    assert (sample.mask, sample.confirmed, sample.group, sample.attribution) == (
        tmp_path / "m.png", "histo", "p", "A",
    )  # fmt: skip
