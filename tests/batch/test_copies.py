"""Copies within a job: the first stays, whatever the light, the turn or the number of copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dermaflux import duplicates
from serving.batch import copies


def picture(seed: int, side: int = 96) -> Image.Image:
    """Texture of several scales: no two seeds are alike."""
    random = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells in (4, 12, 32):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 3
    return Image.fromarray(total.astype(np.uint8))


def saved(folder: Path, pictures: list[Image.Image]) -> list[tuple[str, Path]]:
    listed = []
    for number, one in enumerate(pictures):
        one.save(folder / f"{number:04d}.png")
        listed.append((f"{number:04d}", folder / f"{number:04d}.png"))
    return listed


def test_the_first_stays_and_is_named(tmp_path):
    first, other = picture(1), picture(2)
    turned = ImageOps.mirror(first.rotate(90))
    lighter = first.point(lambda value: value * 1.1)
    listed = saved(tmp_path, [first, other, turned, picture(3), lighter])
    found = copies.find(listed)
    assert list(found) == ["0002", "0004"]
    assert {kept for kept, _ in found.values()} == {"0000"}
    assert all(duplicates.SAME <= value <= 1 for _, value in found.values())
    assert found == copies.find(listed, threads=1)


def test_order_decides_who_stays(tmp_path):
    listed = saved(tmp_path, [picture(1), picture(2), ImageOps.flip(picture(1))])
    assert list(copies.find(listed)) == ["0002"]
    assert list(copies.find(listed[::-1])) == ["0000"]


def test_one_stays_of_more_copies_than_are_compared_at_once(tmp_path):
    # Some are the same to the bit, some are not.
    same = [picture(1, 48).point(lambda value, n=n: value - n // 2) for n in range(130)]
    listed = saved(tmp_path, [picture(5, 48), *same, picture(6, 48)])
    found = copies.find(listed)
    assert len(found) == 129
    assert {kept for kept, _ in found.values()} == {"0001"}


def test_what_goes_is_a_copy_of_one_that_stays():
    # 1 is like 0 and 2 is like 1, but 2 is not like 0: it stays.
    assert copies._first_stay({1: {0: 0.8}, 2: {1: 0.9}}) == {1: (0, 0.8)}
    assert copies._first_stay({2: {0: 0.8, 1: 0.9}}) == {2: (1, 0.9)}
    assert copies._first_stay({2: {0: 0.8, 1: 0.8}}) == {2: (0, 0.8)}


def test_a_higher_threshold_lets_more_pass(tmp_path):
    cut = picture(1).crop((3, 3, 96, 96))
    listed = saved(tmp_path, [picture(1), cut])
    ((_, value),) = copies.find(listed).values()
    assert value < 0.9999
    assert copies.find(listed, threshold=value) != {}
    assert copies.find(listed, threshold=value + 0.0001) == {}


def test_unreadable_pictures_are_told_and_no_copies(tmp_path, caplog):
    listed = saved(tmp_path, [picture(1), picture(2), picture(1)])
    (tmp_path / "0000.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    listed.insert(1, ("gone", tmp_path / "gone.png"))
    assert copies.find(listed) == {}
    assert "0000 was not compared" in caplog.text
    assert "gone was not compared" in caplog.text
    assert set(copies.look(listed).broken) == {"0000", "gone"}


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (226, 188, 168)])
def test_flat_pictures_are_copies_where_they_are_equal(tmp_path, colour):
    flat, other = Image.new("RGB", (64, 64), colour), Image.new("RGB", (64, 64), (90, 60, 40))
    listed = saved(tmp_path, [flat, other, flat])
    assert copies.find(listed) == {"0002": ("0000", 1.0)}
    assert copies.find(listed[:2]) == {}
    assert copies.find([]) == {}


@pytest.mark.parametrize("threshold", [0.5, 1.01, float("nan")])
def test_thresholds_that_cannot_be_met_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        copies.find([], threshold)
