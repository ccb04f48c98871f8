"""Copies of drawn lesions are found however they were altered; strangers alike in shape are not."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dermaflux import alignment, duplicates, thumbnails
from dermaflux.errors import DatasetError

Alter = Callable[[Image.Image], Image.Image]


def lesion(seed: int, width: int = 160, height: int = 160) -> Image.Image:
    """A dark blob in the middle of skin: the same shape for all, texture of its own."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    noise = rng.normal(size=(height // 6 + 1, width // 6 + 1))
    texture = np.asarray(
        Image.fromarray(noise.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    )
    far = np.hypot((rows - height / 2) / height, (columns - width / 2) / width)
    dark = 1 / (1 + np.exp((far - 0.2) * 40))
    grey = 200 - 110 * dark + 14 * texture
    # Down and to the right it is lighter, so that no turn of it is itself.
    grey = grey + 20 * (rows / height) + 8 * (columns / width)
    return Image.fromarray(
        np.clip(np.stack([grey, grey * 0.8, grey * 0.7], -1), 0, 255).astype("u1")
    )


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue()))


def index(images: list[Image.Image], groups: list[str] | None = None) -> thumbnails.Index:
    thumbs, owner = [], []
    for number, image in enumerate(images):
        for view in thumbnails.views(image):
            thumbs.append(view)
            owner.append(number)
    names = tuple(str(number) for number in range(len(images)))
    return thumbnails.Index(np.stack(thumbs), np.array(owner), names, tuple(groups or names))


@pytest.fixture(scope="module")
def strangers() -> list[Image.Image]:
    return [lesion(seed) for seed in range(60)]


TURNS: list[Alter] = [
    lambda image, t=t, flip=flip: ImageOps.mirror(image.rotate(t)) if flip else image.rotate(t)  # type: ignore[misc]
    for t in (0, 90, 180, 270)
    for flip in (False, True)
]


@pytest.mark.parametrize("turn", TURNS)
def test_all_eight_turns_of_a_picture_are_it(strangers: list[Image.Image], turn: Alter) -> None:
    copies = index([turn(image) for image in strangers[:6]])
    found = duplicates.twins(copies, index(strangers))
    assert [(one.one, one.other) for one in found] == [(n, n) for n in range(6)]
    assert min(one.similarity for one in found) > 0.95


@pytest.mark.parametrize(
    "alter",
    [
        lambda image: jpeg(image, 30),
        lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
        lambda image: image.resize((400, 300), Image.Resampling.LANCZOS),
        lambda image: image.crop((6, 2, 158, 154)),
        lambda image: image.crop((4, 0, 156, 150)).transpose(Image.Transpose.TRANSPOSE),
        lambda image: image.point(lambda value: value * 0.7 + 40),
        lambda image: image.rotate(3, Image.Resampling.BICUBIC).crop((7, 7, 153, 153)),
    ],
    ids=["recompressed", "shrunk", "squashed", "cropped", "cropped and turned", "light", "3 deg"],
)
def test_altered_copies_are_found(strangers: list[Image.Image], alter: Alter) -> None:
    copies = index([alter(image) for image in strangers[:8]])
    pairs = {(one.one, one.other) for one in duplicates.twins(copies, index(strangers))}
    assert pairs == {(n, n) for n in range(8)}


def test_strangers_of_one_shape_are_none(strangers: list[Image.Image]) -> None:
    assert duplicates.twins(index(strangers)) == []


def test_the_centre_of_an_oblong_picture_is_it() -> None:
    whole = [lesion(seed, 240, 160) for seed in range(5)]
    squares = [image.crop((40, 0, 200, 160)) for image in whole]
    assert [(t.one, t.other) for t in duplicates.twins(index(squares), index(whole))] == [
        (n, n) for n in range(5)
    ]


def test_within_one_index_each_pair_comes_once(strangers: list[Image.Image]) -> None:
    copies = [*strangers[:10], jpeg(strangers[3], 60), ImageOps.flip(strangers[7])]
    found = duplicates.twins(index(copies), threads=1)
    assert [(one.one, one.other) for one in found] == [(3, 10), (7, 11)]


def test_blank_pictures_are_like_none() -> None:
    blank = index([Image.new("RGB", (80, 80), shade) for shade in ("black", "black", "white")])
    assert duplicates.twins(blank) == []
    assert duplicates.twins(blank, index([lesion(1)])) == []


def test_the_nearest_come_with_name_and_group(strangers: list[Image.Image]) -> None:
    seen = index(strangers, [f"patient {n // 2}" for n in range(60)])
    ((best, *rest), second) = duplicates.nearest(seen, [strangers[9].rotate(90), lesion(99)], 3)
    assert (best.name, best.group) == ("9", "patient 4")
    assert best.similarity > 0.95
    assert len(rest) == 2
    assert all(near.similarity < duplicates.SAME for near in [*rest, *second])


def test_an_index_comes_back_as_it_was(strangers: list[Image.Image], tmp_path: Path) -> None:
    seen = index(strangers[:4], ["a", "a", "b", "ü"])
    seen.save(tmp_path / "seen.npz")
    again = thumbnails.Index.load(tmp_path / "seen.npz")
    assert (again.names, again.groups) == (seen.names, seen.groups)
    assert np.array_equal(again.thumbs, seen.thumbs)
    assert [file.name for file in tmp_path.iterdir()] == ["seen.npz"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seen.npz").write_bytes(content)
    with pytest.raises(DatasetError, match=r"seen\.npz.*training\.data index"):
        thumbnails.Index.load(tmp_path / "seen.npz")


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "seen.npz", thumbs=np.zeros((1, 8, 8), "u1"), owner=[0], names=["a"],
             groups=["a"])  # fmt: skip
    with pytest.raises(DatasetError, match="another version"):
        thumbnails.Index.load(tmp_path / "seen.npz")


def test_broken_pictures_are_listed_and_left_out(tmp_path: Path) -> None:
    lesion(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    files = [(name, "", tmp_path / name) for name in ("a.png", "b.png", "c.png", "d.png")]
    built = thumbnails.build(files)
    assert built.index.names == ("a.png",)
    assert sorted(built.broken) == ["b.png", "c.png", "d.png"]


def test_two_indexes_are_joined(strangers: list[Image.Image]) -> None:
    both = thumbnails.joined([index(strangers[:3]), index([lesion(5, 240, 160), strangers[4]])])
    assert len(both) == 5
    assert both.owner.tolist() == [0, 1, 2, 3, 3, 4]


def test_groups_are_united_over_chains() -> None:
    groups = ["d", "b", "c", "a", "b", "e"]
    assert duplicates.united(groups, [(0, 1), (2, 3), (4, 2)]) == ["a", "a", "a", "a", "a", "e"]
    assert duplicates.united(groups, []) == groups


def test_cosines_turn_as_pictures_do() -> None:
    rng = np.random.default_rng(0)
    thumbs: NDArray[np.uint8] = rng.integers(0, 255, (1, 48, 48)).astype(np.uint8)
    low = alignment.cosines(thumbs, 8)
    for turn in range(8):
        turned = alignment.turned(thumbs, np.array([turn]))
        assert np.allclose(
            alignment.cosines(turned, 8), alignment.turned_cosines(low, turn), atol=1e-2
        )


def test_a_damaged_index_is_refused_or_the_same(
    strangers: list[Image.Image], tmp_path: Path
) -> None:
    seen, file = index(strangers[:3]), tmp_path / "seen.npz"
    seen.save(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    # Half of them where the archive keeps sizes and methods: at its end.
    places = [*rng.integers(0, len(whole), 30), *rng.integers(len(whole) - 300, len(whole), 30)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            again = thumbnails.Index.load(file)
        except DatasetError as error:
            refused += str(file) in str(error)
        else:
            assert np.array_equal(again.thumbs, seen.thumbs)
            assert (again.names, again.groups) == (seen.names, seen.groups)
    assert refused >= 30


def test_a_stream_that_does_not_unpack_is_refused(
    strangers: list[Image.Image], tmp_path: Path
) -> None:
    file = tmp_path / "seen.npz"
    index(strangers[:3]).save(file)
    damaged = bytearray(file.read_bytes())
    start = damaged.index(b"thumbs.npy")
    damaged[start + 60 : start + 100] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"seen\.npz is no index"):
        thumbnails.Index.load(file)


def test_a_header_that_does_not_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "seen.npz"
    header = b"{'descr': '|u1', 'fortran_order': (\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("thumbs.npy", b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    with pytest.raises(DatasetError, match=r"seen\.npz is no index"):
        thumbnails.Index.load(file)


def test_arrays_of_other_kinds_are_no_index(tmp_path: Path) -> None:
    thumbs = np.zeros((1, 48, 48), "u1")
    for change in ({"names": [7]}, {"owner": 0}, {"owner": [0.5]}, {"groups": "a"}):
        good = {"thumbs": thumbs, "owner": [0], "names": ["a"], "groups": ["a"]}
        np.savez(tmp_path / "seen.npz", **(good | change))  # type: ignore[arg-type]
        with pytest.raises(DatasetError, match="another version"):
            thumbnails.Index.load(tmp_path / "seen.npz")


def test_reasons_are_the_same_in_every_run() -> None:
    with pytest.raises(OSError, match="BytesIO") as caught:
        Image.open(io.BytesIO(b"no picture"))
    assert thumbnails.why(caught.value) == "cannot identify image file"
