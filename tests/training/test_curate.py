"""Splits that divide no group, checks that find what is wrong, tests on what was seen refused."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from dermaflux import dataset, thumbnails
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from tests.core.test_duplicates import lesion
from training import curate, data, duplicate_rates, grouping, leaks


def made(folder: Path, images: list[Image.Image], **change: list[Any]) -> list[Record]:
    """A dataset of pictures; `change` gives a value of each record's field."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number, image in enumerate(images):
        name = f"images/{number:03}.png"
        image.save(folder / name)
        label = "malignant" if number % 4 == 0 else "benign"
        record = Record(name, label, source="drawn", licence="CC0-1.0", group=f"g{number}")
        fields = {key: values[number] for key, values in change.items()}
        records.append(replace(record, **fields))
    dataset.write(folder, records)
    return records


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    status = curate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out or "{}"), captured.err


def listed(groups: int, each: int) -> list[Record]:
    return [
        Record(f"{group}-{n}.png", ("benign", "malignant")[group % 5 == 0], group=f"g{group}",
               source=f"s{group % 2}")
        for group in range(groups)
        for n in range(each)
    ]  # fmt: skip


def test_a_split_divides_no_group_and_keeps_shares_of_labels() -> None:
    records = grouping.split(listed(200, 3), 0.1, 0.2, seed=0)
    assert grouping.divided(records) == {}
    for label in ("benign", "malignant"):
        counts = Counter(one.split for one in records if one.label == label)
        total = sum(counts.values())
        assert counts["test"] / total == pytest.approx(0.2, abs=0.03)
        assert counts["val"] / total == pytest.approx(0.1, abs=0.03)


def test_a_split_depends_on_its_seed_and_stays_when_data_comes() -> None:
    few, many = listed(200, 1), listed(240, 1)
    first = {r.group: r.split for r in grouping.split(few, 0.1, 0.2, 0)}
    assert first == {r.group: r.split for r in grouping.split(few[::-1], 0.1, 0.2, 0)}
    assert first != {r.group: r.split for r in grouping.split(few, 0.1, 0.2, 1)}
    grown = {r.group: r.split for r in grouping.split(many, 0.1, 0.2, 0)}
    assert sum(first[g] != grown[g] for g in first) < 20


@pytest.mark.parametrize(
    ("val", "test", "said"), [(0.5, 0.5, "nothing to train"), (0.1, 0.2, "few")]
)
def test_a_split_that_cannot_be_is_refused(val: float, test: float, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        grouping.split(listed(2, 1), val, test, 0)


def test_copies_and_numbers_of_the_archive_become_one_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [lesion(n) for n in range(24)]
    images += [ImageOps.mirror(images[2].rotate(90)), images[5].crop((4, 4, 156, 156))]
    made(tmp_path / "d", images)
    status, summary, _ = told(capsys, "split", tmp_path / "d", "--val", 0.2, "--test", 0.3)
    assert status == 0
    assert (summary["near_duplicates"], summary["groups"]) == (2, 24)
    records = dataset.read(tmp_path / "d")
    assert records[24].group == records[2].group == "g2"
    assert records[25].group == records[5].group == "g25"
    assert records[5].more["source_group"] == "g5"
    assert grouping.divided(records) == {}
    one = [
        Record("x/ISIC_0000001.jpg", "benign", group="a"),
        Record("y/ISIC_0000001_downsampled.png", "benign", group="b"),
        Record("z.png", "benign", sha256="5"),
        Record("w.png", "benign", sha256="5"),
    ]
    assert grouping.same(one) == [(0, 1), (2, 3)]


def test_a_good_dataset_passes_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "d", [lesion(n) for n in range(6)])
    status, report, said = told(capsys, "check", tmp_path / "d")
    assert (status, report["wrong"]) == (0, [])
    assert report["labels"] == {"malignant": 2, "benign": 4}
    assert report["licences"] == {"CC0-1.0": 6}
    assert "pictures are" not in said


def test_the_check_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [lesion(n) for n in range(6)]
    images.append(ImageOps.flip(images[1]))
    made(
        tmp_path / "d", images,
        split=["train", "train", "train", "train", "train", "test", "test"],
        group=["a", "b", "c", "d", "e", "e", "f"],
        sha256=["", "", "", "", "wrong", "", ""],
    )  # fmt: skip
    (tmp_path / "d/images/002.png").unlink()
    (tmp_path / "d/images/003.png").write_bytes(b"no picture")
    status, report, said = told(capsys, "check", tmp_path / "d")
    assert status == 1
    assert (report["missing"], report["broken"], report["changed"]) == (1, 1, 1)
    assert report["divided_groups"] == 1
    assert report["near_duplicates_across_splits"] == 1
    for words in (
        "missing, such as images/002.png",
        "broken, such as images/003.png",
        "another sha256",
        "e in test and train",
        "images/001.png and images/006.png",
    ):
        assert words in said


def test_copies_with_two_labels_are_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "d", [lesion(0), lesion(0)], group=["a", "a"])
    status, report, _ = told(capsys, "check", tmp_path / "d")
    assert (status, report["near_duplicates_with_other_label"]) == (1, 1)


def test_datasets_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "one", [lesion(n) for n in range(3)], group=["images/000.png", "p", "q"])
    made(tmp_path / "two", [lesion(n) for n in range(2)], group=["images/000.png", "p"])
    parts = (tmp_path / "one", tmp_path / "two")
    status, summary, _ = told(capsys, "merge", *parts, "--out", tmp_path / "all")
    assert (status, summary["images"]) == (0, 5)
    samples = data.read(tmp_path / "all")
    assert data.load_images(samples, 8).shape == (5, 8, 8, 3)
    assert samples[0].group != samples[3].group
    assert samples[1].group == samples[4].group
    status, _, said = told(capsys, "merge", *parts, "--out", tmp_path / "all")
    assert (status, "holds a dataset" in said) == (2, True)
    status, _, said = told(capsys, "merge", parts[0], parts[0], "--out", tmp_path / "other")
    assert (status, "named one" in said) == (2, True)


def test_what_was_seen_is_refused_with_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "train", [lesion(n) for n in range(8)], split=["train"] * 7 + ["test"])
    images = [lesion(50), lesion(3).rotate(180), lesion(51), lesion(7)]
    made(tmp_path / "test", images, split=["test"] * 4, group=["x", "y", "g2", "z"])
    status, summary, _ = told(capsys, "index", tmp_path / "train", "--out", tmp_path / "seen.npz")
    assert (status, summary["images"]) == (0, 7)
    for seen in (tmp_path / "seen.npz", tmp_path / "train"):
        status, report, said = told(capsys, "leaks", tmp_path / "test", "--seen", seen)
        assert (status, report["leaks"], report["test"]) == (1, 2, 4)
        assert [Path(test).name for test, _, _ in report["pairs"]] == ["001.png", "002.png"]
        assert "near-duplicates, 1.00" in said
        assert "group g2" in said
    test = leaks.index(data.read(tmp_path / "test"))
    with pytest.raises(DatasetError, match=r"(?s)2 of 4 test pictures were seen by it:.*001\.png"):
        leaks.refuse(test, leaks.seen(tmp_path / "seen.npz"), "it")


def test_what_was_not_seen_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "train", [lesion(n) for n in range(8)])
    made(tmp_path / "test", [lesion(n) for n in range(20, 26)], split=["test"] * 6,
         group=[f"images/{n:03}.png" for n in range(6)])  # fmt: skip
    status, report, _ = told(capsys, "leaks", tmp_path / "test", "--seen", tmp_path / "train")
    assert (status, report["leaks"]) == (0, 0)


def test_the_archives_number_is_enough(tmp_path: Path) -> None:
    def index(name: str) -> thumbnails.Index:
        thumbs = np.zeros((1, 48, 48), np.uint8)
        return thumbnails.Index(thumbs, np.zeros(1, np.int64), (name,), ("",))

    (leak,) = leaks.find(index("a/ISIC_0024306.jpg"), index("b/ISIC_0024306_downsampled.png"))
    assert leaks.reason(leak) == "both are ISIC_0024306"


def test_a_test_that_cannot_be_looked_at_is_not_vouched_for(tmp_path: Path) -> None:
    made(tmp_path / "d", [lesion(0)])
    (tmp_path / "d/images/000.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"1 pictures cannot be read.*000\.png"):
        leaks.index(data.read(tmp_path / "d"))


def test_rates_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "d", [lesion(n) for n in range(12)])
    assert duplicate_rates.main([str(tmp_path / "d"), "--pictures", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["missed"]) == set(duplicate_rates.ALTERED)
    assert report["missed"]["flipped and turned"] == 0
    assert report["of_other_groups"] == []


def test_pictures_whose_paths_end_alike_are_all_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one"
    names = ("images/x.png", "x.png", "masks/x.png")
    for number, name in enumerate(names):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 50 * number).save(one / name)
    masks = ("masks/x.png", "x.png", None)
    dataset.write(
        one, [Record(name, "benign", mask=mask) for name, mask in zip(names, masks, strict=True)]
    )
    assert told(capsys, "merge", one, "--out", tmp_path / "all")[0] == 0
    records = dataset.read(tmp_path / "all")
    for record, name, mask in zip(records, names, masks, strict=True):
        assert (tmp_path / "all" / record.file_name).read_bytes() == (one / name).read_bytes()
        if mask:
            path = tmp_path / "all" / str(record.mask)
            assert path.read_bytes() == (one / mask).read_bytes()


def test_a_merge_started_again_replaces_what_is_stale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "one", [lesion(0), lesion(1)])
    merge = ("merge", tmp_path / "one", "--out", tmp_path / "all")
    assert told(capsys, *merge)[0] == 0
    (tmp_path / "all" / dataset.METADATA).unlink()
    stale, kept = (tmp_path / "all" / one.file_name for one in _names(tmp_path / "one"))
    content, place = stale.read_bytes(), kept.stat().st_ino
    stale.unlink()
    stale.write_bytes(content[:-1] + b"x")
    assert told(capsys, *merge)[0] == 0
    assert stale.read_bytes() == content
    assert kept.stat().st_ino == place
    assert not list((tmp_path / "all").rglob("*.part"))


def _names(folder: Path) -> list[Record]:
    return [
        replace(one, file_name=f"images/{folder.name}/{one.file_name}")
        for one in dataset.read(folder)
    ]


def test_shares_and_targets_are_checked_before_pictures_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "d", [lesion(n) for n in range(3)])

    def reads(*_: Any) -> Any:
        raise AssertionError("pictures are read")

    monkeypatch.setattr(thumbnails, "build", reads)
    status, _, said = told(capsys, "split", tmp_path / "d", "--val", 0.6, "--test", 0.5)
    assert (status, "nothing to train on" in said) == (2, True)
    status, _, said = told(capsys, "index", tmp_path / "d", "--out", tmp_path / "no" / "x.npz")
    assert (status, "there is no folder" in said) == (2, True)
    status, _, said = told(capsys, "index", tmp_path / "d", "--out", tmp_path)
    assert (status, "is a folder" in said) == (2, True)


def test_a_split_on_a_full_disk_names_the_file_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "d", [lesion(n) for n in range(12)])
    before = (tmp_path / "d" / dataset.METADATA).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, _, said = told(capsys, "split", tmp_path / "d", "--val", 0.2, "--test", 0.3)
    assert status == 2
    assert f"{tmp_path / 'd' / dataset.METADATA} cannot be written: No space left" in said
    assert (tmp_path / "d" / dataset.METADATA).read_bytes() == before
