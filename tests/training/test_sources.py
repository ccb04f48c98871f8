"""Each collection is read from a folder packed as its publisher packs it."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from tests.training import published
from training import curate, importing, labels
from training.sources import table
from training.sources.found import Found, Pictures

MAP = labels.read()


def imported(name: str, folder: Path, out: Path, **plan: Any) -> tuple[dict[str, Any], Any]:
    summary = importing.run(table.named(name), folder, out, importing.Plan(**plan), MAP)
    return summary, {Path(one.file_name).stem: one for one in dataset.read(out)}


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, Record]]]:
    def work(name: str, write: Any = None, **plan: Any) -> Any:
        (write or published.PACKED[name])(tmp_path / "published")
        return imported(name, tmp_path / "published", tmp_path / "out", **plan)

    return work


def test_every_collection_has_a_folder_to_be_tested_with() -> None:
    assert set(published.PACKED) == {one.name for one in table.COLLECTIONS}
    assert set(published.PACKED) == set(MAP.collections)


@pytest.mark.parametrize("name", list(published.PACKED))
def test_every_record_says_whose_it_is(packed: Any, name: str, tmp_path: Path) -> None:
    summary, records = packed(name)
    assert summary["broken"] == 0
    for record in records.values():
        assert (tmp_path / "out" / record.file_name).is_file()
        assert record.licence
        assert record.source
        assert record.attribution
        assert len(record.sha256) == 64
        assert record.group
        assert record.more["label_map"] == MAP.version
        assert record.more["collection"] == name


def test_mednode(packed: Any) -> None:
    _, records = packed("mednode")
    assert {name: one.label for name, one in records.items()} == {
        "melanoma_241395": "malignant", "naevus_241395": "benign", "naevus_1412510": "benign",
    }  # fmt: skip
    assert records["naevus_241395"].group == "mednode naevus_241395"
    assert records["naevus_241395"].licence == "not stated by the publisher"


def test_hiba(packed: Any) -> None:
    summary, records = packed("hiba")
    assert set(records) == {"ISIC_0000001", "ISIC_0000003"}
    assert summary["excluded"] == {
        "indeterminate: the publisher calls it indeterminate": 1,
        "malignant: malignant, but Nevus": 1,
    }
    one = records["ISIC_0000001"]
    assert (one.label, one.diagnosis, one.confirmed) == (
        "malignant", "basal cell carcinoma", "histo",
    )  # fmt: skip
    assert (one.group, one.licence, one.skin_type, one.age) == ("IP_7", "CC-BY-4.0", "II", 60)
    assert one.more["modality"] == "clinical"
    other = records["ISIC_0000003"]
    assert (other.diagnosis, other.skin_type, other.age) == ("nevus", None, None)


def test_hiba_as_it_was_in_2022(packed: Any) -> None:
    _, records = packed("hiba", published.hiba_2022)
    assert records["ISIC_0000001"].diagnosis == "melanoma"


def test_derm12345(packed: Any) -> None:
    summary, records = packed("derm12345")
    assert set(records) == {"D_001", "D_003"}
    assert records["D_001"].group == "DERM12345 P_1"
    assert (records["D_003"].split, records["D_003"].diagnosis) == ("test", "nevus")
    assert summary["excluded"] == {
        "ak: actinic keratosis: the publisher calls it indeterminate": 1,
        "ch: the map says malignant, another column benign": 1,
    }


def test_isic2017(packed: Any) -> None:
    summary, records = packed("isic2017")
    assert summary["splits"] == {"train": 3, "val": 3, "test": 3}
    assert records["ISIC_0000010"].diagnosis == "melanoma"
    assert records["ISIC_0000021"].diagnosis == "seborrheic keratosis"
    assert records["ISIC_0000032"].diagnosis == "nevus"
    assert records["ISIC_0000010"].mask == "masks/ISIC_0000010.png"
    assert records["ISIC_0000012"].mask is None
    ages = [records[f"ISIC_000001{n}"].age for n in range(3)]
    assert ages == [55, None, 85]


def test_isic2019(packed: Any) -> None:
    summary, records = packed("isic2019")
    assert set(records) == {"ISIC_0000001", "ISIC_0000002_downsampled", "ISIC_0000004"}
    assert records["ISIC_0000001"].group == "ISIC_0000001"
    assert records["ISIC_0000002_downsampled"].group == "MSK4_0011169"
    assert records["ISIC_0000004"].diagnosis is None
    assert list(summary["excluded"].values()) == [1]


def test_isic2020(packed: Any) -> None:
    summary, records = packed("isic2020")
    assert len(records) == 3
    assert {one.group for one in records.values()} == {"IP_7279968", "IP_3075186"}
    assert records["ISIC_0000001"].diagnosis is None
    assert records["ISIC_0000002"].diagnosis == "melanoma"
    assert "not determined" in next(iter(summary["excluded"]))


def test_isic2024(packed: Any) -> None:
    _, records = packed("isic2024")
    assert records["ISIC_0015670"].label == "benign"
    one = records["ISIC_0015845"]
    assert (one.label, one.diagnosis, one.group) == ("malignant", "melanoma", "IP_8170065")
    assert (one.licence, one.sex) == ("CC-BY-NC-4.0", "male")


def test_isic2024_from_the_archive(packed: Any) -> None:
    _, records = packed("isic2024", published.isic2024_archive)
    assert (records["ISIC_0015670"].label, records["ISIC_0015670"].licence) == (
        "malignant", "CC0-1.0",
    )  # fmt: skip


def test_isic2024_in_one_file_is_said_to_be_unpacked(tmp_path: Path) -> None:
    published.isic2024(tmp_path)
    for file in (tmp_path / "train-image").rglob("*.jpg"):
        file.unlink()
    with pytest.raises(DatasetError, match=r"unpack train-image\.hdf5"):
        list(table.named("isic2024").read(tmp_path))


def test_milk10k(packed: Any) -> None:
    summary, records = packed("milk10k", modality="dermoscopic")
    assert set(records) == {"ISIC_0000002"}
    assert summary["excluded"]["modality clinical"] == 1
    one = records["ISIC_0000002"]
    assert (one.group, one.confirmed, one.licence) == ("IL_1", "histo", "CC-BY-NC-4.0")
    assert one.skin_type is None
    assert one.more["skin_tone_class"] == "3"


def test_pad_ufes_20(packed: Any) -> None:
    _, records = packed("pad-ufes-20")
    one, other = records["PAT_46_881_939"], records["PAT_8_15_820"]
    assert (one.label, one.group, one.skin_type, one.sex, one.site, one.confirmed) == (
        "malignant", "PAD-UFES-20 PAT_46", "III", "female", "neck", "histo",
    )  # fmt: skip
    assert (other.label, other.diagnosis, other.confirmed, other.skin_type) == (
        "benign", "actinic keratosis", "", None,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "stem"), [("kaggle1", "melanoma_0"), ("kaggle2", "6299")])
def test_the_two_kaggle_sets(packed: Any, name: str, stem: str) -> None:
    summary, records = packed(name)
    assert summary["splits"] == {"test": 2, "train": 2}
    assert summary["labels"] == {"benign": 2, "malignant": 2}
    assert records[f"test_benign_{stem}"].group == f"{name} test_benign_{stem}"


def test_ddi(packed: Any) -> None:
    _, records = packed("ddi")
    one, other = records["ddi_000001"], records["ddi_000002"]
    assert (one.label, one.diagnosis, one.skin_type) == ("malignant", "melanoma", "V-VI")
    assert (other.label, other.diagnosis, other.skin_type) == ("benign", None, "I-II")


def test_ham10000(packed: Any) -> None:
    summary, records = packed("ham10000")
    assert summary["groups"] == 2
    assert records["ISIC_0027419"].mask == "masks/ISIC_0027419.png"
    assert (records["ISIC_0031633"].confirmed, records["ISIC_0031633"].site) == ("follow_up", None)


def test_measured_attributes_stay(packed: Any) -> None:
    _, records = packed("measured")
    one = records["a"]
    assert (one.diagnosis, one.border, one.size, one.colors, one.structures) == (
        "nevus", "irregular", "edge", ("light brown", "black"), ("globules",),
    )  # fmt: skip
    assert (one.split, one.group, one.source, one.mask) == ("test", "g", "S", "masks/a.png")


def test_a_missing_table_or_column_is_named(tmp_path: Path) -> None:
    published.picture(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"no ddi_metadata\.csv.*publisher"):
        list(table.named("ddi").read(tmp_path))
    published.text(tmp_path / "ddi_metadata.csv", "DDI_file,malignant,disease", "a.png,True,x")
    with pytest.raises(DatasetError, match="no column 'skin_tone'; it has DDI_file"):
        list(table.named("ddi").read(tmp_path))


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    published.picture(tmp_path / "a.png")
    (tmp_path / "ddi_metadata.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"ddi_metadata\.csv is no table"):
        list(table.named("ddi").read(tmp_path))


@pytest.mark.parametrize("name", list(published.PACKED))
def test_an_empty_or_absent_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises((DatasetError, FileNotFoundError)):
        list(table.named(name).read(tmp_path))
    with pytest.raises((DatasetError, FileNotFoundError)):
        list(table.named(name).read(tmp_path / "nothing"))


def test_an_unknown_class_names_the_class_and_the_file(tmp_path: Path) -> None:
    published.ham10000(tmp_path)
    text = (tmp_path / "HAM10000_metadata").read_text().replace(",mel,", ",lentigo,")
    (tmp_path / "HAM10000_metadata").write_text(text)
    with pytest.raises(DatasetError, match=r"class 'lentigo'.*labels\.toml.*\[ham10000\]"):
        imported("ham10000", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_and_missing_pictures_are_listed_and_the_rest_stands(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published.ham10000(folder)
    (folder / "HAM10000_images_part_1" / "ISIC_0027419.jpg").unlink()
    broken = folder / "HAM10000_images_part_1" / "ISIC_0025030.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    summary, records = imported("ham10000", folder, tmp_path / "out")
    assert set(records) == {"ISIC_0031633"}
    assert summary["broken"] == 2
    assert "lacks it" in summary["broken_images"]["ISIC_0027419"]


def test_a_broken_mask_costs_the_mask_alone(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published.ham10000(folder)
    next(folder.rglob("*_segmentation.png")).write_bytes(b"no picture")
    summary, records = imported("ham10000", folder, tmp_path / "out")
    assert summary["broken_masks"] == ["ISIC_0027419"]
    assert records["ISIC_0027419"].mask is None


def test_pictures_are_shrunk_with_their_masks(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "published"
    published.ham10000(folder)
    _, records = imported("ham10000", folder, tmp_path / "out", size=16)
    one = records["ISIC_0027419"]
    with Image.open(tmp_path / "out" / one.file_name) as image:
        assert image.size == (21, 16)
        assert image.format == "JPEG"
    with Image.open(tmp_path / "out" / str(one.mask)) as mask:
        assert mask.size == (21, 16)


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_pictures_can_be_linked(packed: Any, link: str, tmp_path: Path) -> None:
    _, records = packed("ddi", link=link)
    file = tmp_path / "out" / records["ddi_000001"].file_name
    assert file.samefile(tmp_path / "published" / "000001.png")


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "published"
    published.isic2020(folder)
    brought: list[str] = []
    bring = importing._bring

    def dying(one: Found, *rest: Any) -> Any:
        if len(brought) == 2:
            raise KeyboardInterrupt
        brought.append(one.name)
        return bring(one, *rest)

    monkeypatch.setattr(importing, "_bring", dying)
    with pytest.raises(KeyboardInterrupt):
        imported("isic2020", folder, tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / dataset.METADATA).exists()
    with (tmp_path / "out" / importing.PROGRESS).open("a") as notes:
        notes.write('{"name": "ISIC_00')
    monkeypatch.setattr(importing, "_bring", bring)
    _, records = imported("isic2020", folder, tmp_path / "out")
    _, fresh = imported("isic2020", folder, tmp_path / "fresh")
    assert records == fresh


def test_another_import_into_the_same_folder_is_refused(packed: Any, tmp_path: Path) -> None:
    packed("ddi")
    with pytest.raises(DatasetError, match="another size"):
        imported("ddi", tmp_path / "published", tmp_path / "out", size=8)


def test_a_repaired_picture_is_imported_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published.ddi(folder)
    (folder / "000001.png").unlink()
    assert imported("ddi", folder, tmp_path / "out")[0]["broken"] == 1
    published.picture(folder / "000001.png")
    assert imported("ddi", folder, tmp_path / "out")[0]["images"] == 2


def test_the_command_ends_in_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.pad_ufes_20(tmp_path / "published")
    arguments = ["import", "pad-ufes-20", str(tmp_path / "published"), "--out"]
    assert curate.main([*arguments, str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2
    assert curate.main(["import", "ddi", str(tmp_path / "published"), "--out", "x"]) == 2
    assert "ddi_metadata.csv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('version = "labels-1"', "no version"),
        ('mel = { label = "malignant", diagnosis = "melanoma" }', "needs a label"),
        ('label = "malignant", diagnosis = "melanoma"', "label"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path: Path, change: str, said: str) -> None:
    words = {"no version": "", "needs a label": "mel = { diagnosis = 'melanoma' }"}
    new = words.get(said, 'label = "odd", diagnosis = "melanoma"')
    text = labels.FILE.read_text(encoding="utf-8")
    assert change in text
    (tmp_path / "map.toml").write_text(text.replace(change, new))
    with pytest.raises(DatasetError, match=said):
        labels.read(tmp_path / "map.toml")


def test_a_site_can_bring_its_own_map(tmp_path: Path) -> None:
    published.isic2019(tmp_path / "published")
    own = dataclasses.replace(MAP, version="ours-1", collections=copy.deepcopy(MAP.collections))
    own.collections["isic2019"]["classes"]["ak"] = {"label": "malignant"}
    collection = table.named("isic2019")
    importing.run(collection, tmp_path / "published", tmp_path / "out", importing.Plan(), own)
    records = {Path(one.file_name).stem: one for one in dataset.read(tmp_path / "out")}
    assert records["ISIC_0000003"].label == "malignant"
    assert records["ISIC_0000003"].more["label_map"] == "ours-1"


def test_an_import_into_a_finished_dataset_keeps_what_was_made_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "published", tmp_path / "out"
    published.ham10000(folder)
    (folder / "HAM10000_images_part_1" / "ISIC_0025030.jpg").unlink()
    command = ["import", "ham10000", str(folder), "--out", str(out)]
    assert curate.main(command) == 0
    own = [
        dataclasses.replace(
            one, text="a caption", split="test", group="united", border="irregular", mask=None,
            more={**one.more, "source_group": one.group, "seed": 7},
        )
        for one in dataset.read(out)
    ]  # fmt: skip
    dataset.write(out, own)
    content = (out / dataset.METADATA).read_bytes()
    capsys.readouterr()
    assert curate.main(command) == 0
    assert (out / dataset.METADATA).read_bytes() == content
    assert "its 2 records stay as they are, 0 were added" in capsys.readouterr().err

    published.picture(folder / "HAM10000_images_part_1" / "ISIC_0025030.jpg")
    assert curate.main(command) == 0
    captured = capsys.readouterr()
    assert "its 2 records stay as they are, 1 were added" in captured.err
    assert json.loads(captured.out)["images"] == 3
    *kept, added = dataset.read(out)
    assert kept == own
    # The other picture of its lesion was put into the test split.
    assert (added.file_name, added.text) == ("images/ISIC_0025030.jpg", "")
    assert (added.group, added.split) == ("united", "test")


@pytest.mark.parametrize("cells", [",", "", "0.0,", "0.0,x", "nan,0.0", "0.0,0.5", "-1,0"])
def test_a_truth_that_is_cut_is_no_nevus(tmp_path: Path, cells: str) -> None:
    published.isic2017(tmp_path)
    file = next(tmp_path.rglob("ISIC-2017_Training_Part3_GroundTruth.csv"))
    text = file.read_text()
    assert "ISIC_0000012,0.0,0.0" in text
    file.write_text(text.replace("ISIC_0000012,0.0,0.0", f"ISIC_0000012,{cells}".rstrip()))
    with pytest.raises(DatasetError, match=r"Training_Part3_GroundTruth\.csv, row ISIC_0000012: "):
        list(table.named("isic2017").read(tmp_path))


@pytest.mark.parametrize("name", ["isic2019", "milk10k"])
def test_a_cut_row_of_many_classes_is_an_error(tmp_path: Path, name: str) -> None:
    published.PACKED[name](tmp_path)
    file = next(tmp_path.rglob("*_Training_GroundTruth.csv"))
    lines = file.read_text().splitlines()
    lines[1] = lines[1].split(",")[0] + ",0.0"
    file.write_text("\n".join(lines))
    with pytest.raises(DatasetError, match=r"GroundTruth\.csv, row I.*0 or 1 is needed"):
        list(table.named(name).read(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('version = "1"\ndiagnoses = 3', "diagnoses needs a table"),
        ('version = "1"\n[diagnoses]\nx = ["nevus"]', "no diagnosis we know"),
        ('version = "1"\n[left_out]\nx = 3', "left_out, 'x' needs its reason"),
        ('version = "1"\nfoo = 3', "foo needs a table"),
        ('version = "1"\n[ddi]\nname = "x"\nlicence = "x"\nattribution = "x"\nclasses = 3',
         "classes needs a table"),
        ('version = "1"\n[ddi]\nname = "x"\nlicence = 3\nattribution = "x"\n[ddi.classes]',
         "licence needs a text"),
        ('version = "1"\n[ddi]\nname = "x"\nlicence = "x"\nattribution = "x"\nclasses.a = 3',
         "class 'a' needs a table"),
        ('version = "1"\n[ddi]\nname = "x"\nlicence = "x"\nattribution = "x"\n'
         "classes.a = { label = [1] }", "label needs a word"),
        ('version = "1"', r"no section \[ddi\]"),
        ('version = "1"\nx = ' + "[" * 5000 + "]" * 5000, "map of labels|needs a table"),
    ],
)  # fmt: skip
def test_a_map_of_another_kind_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    published.ddi(tmp_path / "published")
    (tmp_path / "map.toml").write_text(text)
    command = ["import", "ddi", str(tmp_path / "published"), "--out", str(tmp_path / "out")]
    assert curate.main([*command, "--labels", str(tmp_path / "map.toml")]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert "map.toml" in error


def test_links_to_folders_are_followed_and_never_round(tmp_path: Path) -> None:
    published.isic2017(tmp_path / "disk")
    folder = tmp_path / "published"
    folder.mkdir()
    for place in (tmp_path / "disk").iterdir():
        (folder / place.name).symlink_to(place)
    data = tmp_path / "disk" / "ISIC-2017_Training_Data"
    (data / "round").symlink_to(data)
    (data / "up").symlink_to(tmp_path)
    published.picture(tmp_path / "disk" / "other.jpg")
    (folder / "again").symlink_to(data)
    (folder / "self").symlink_to(folder)
    found = list(table.named("isic2017").read(folder))
    assert len([one for one in found if one.file]) == 9
    assert [one.age for one in found[:3]] == [55, None, 85]
    everything = Pictures.under(folder).all()
    assert len(everything) == len({file.resolve() for file in everything})
    assert not [file for file in everything if file.name == "other.jpg"]


def test_reasons_are_alike_in_every_import(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    published.ham10000(folder)
    next(folder.rglob("ISIC_0025030.jpg")).write_bytes(b"no picture")
    next(folder.rglob("*_segmentation.png")).write_bytes(b"no picture")
    summary, _ = imported("ham10000", folder, tmp_path / "out")
    assert summary["broken_images"] == {"ISIC_0025030": "cannot identify image file"}
    notes = (tmp_path / "out" / importing.PROGRESS).read_text()
    assert " at 0x" not in notes
    assert str(folder / "HAM") not in notes


def test_an_import_on_a_full_disk_names_the_file_and_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published.ham10000(tmp_path / "published")
    command = ["import", "ham10000", str(tmp_path / "published"), "--out", str(tmp_path / "out")]
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name.startswith(".ISIC_0027419.png"):
            write(self, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert curate.main(command) == 2
    mask = tmp_path / "out" / "masks" / "ISIC_0027419.png"
    assert f"{mask} cannot be written: No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.setattr(Path, "write_bytes", write)
    assert curate.main(command) == 0
    assert mask.is_file()


def test_a_name_that_no_record_can_hold_costs_its_picture_alone(tmp_path: Path) -> None:
    published.kaggle2(tmp_path / "published")
    odd = tmp_path / "published" / "train" / "Benign" / "\udcff.jpg"
    odd.write_bytes(next((tmp_path / "published").rglob("6299.jpg")).read_bytes())
    summary, records = imported("kaggle2", tmp_path / "published", tmp_path / "out")
    assert (len(records), summary["broken"]) == (4, 1)
