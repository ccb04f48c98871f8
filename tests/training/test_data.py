from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def broken_png() -> bytes:
    """A picture whose second IDAT has a name that is none: Pillow raises SyntaxError."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second : second + 4] = b"\x00\x01\x02\x03"
    return bytes(content)


def bomb() -> bytes:
    """A PNG whose header says that it has 10^10 pixels."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(
    ("make", "kind"), [(broken_png, SyntaxError), (bomb, Image.DecompressionBombError)]
)
def test_whatever_is_wrong_with_a_picture_its_file_is_named(
    tmp_path: Path, make: Callable[[], bytes], kind: type[Exception]
) -> None:
    (tmp_path / "a.png").write_bytes(make())
    row = '{"file_name": "a.png", "label": "benign", "mask": "a.png"}\n'
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(kind), Image.open(tmp_path / "a.png") as image:
        image.load()
    samples = data.read(tmp_path)
    with pytest.raises(data.DatasetError, match=r"a\.png cannot be read as a picture"):
        data.load_images(samples, 32)
    with pytest.raises(data.DatasetError, match=r"a\.png cannot be read as a mask"):
        data.load_mask(samples[0], 32)
