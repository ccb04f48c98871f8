"""A LoRA that would learn the test is refused before anything is encoded; what it saw is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dermaflux.errors import DatasetError
from dermaflux.thumbnails import Index
from training import curate, leaks
from training.lora import corpus, held_out
from training.lora.settings import Settings, SettingsError

KNOWN = corpus.buckets((32,), 2.0, 16)


def settings(dataset: Path, out: Path, **changes: object) -> Settings:
    out.mkdir(exist_ok=True)
    return Settings(base=Path("base"), data=(dataset,), out=out, **changes)  # type: ignore[arg-type]


@pytest.fixture
def leaking(dataset: Path, tmp_path: Path) -> Path:
    """Another collection, whose test split has a picture of the first's training, mirrored."""
    folder = tmp_path / "other"
    folder.mkdir()
    with Image.open(dataset / "003.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "mirrored.png")
    shutil.copy(dataset / "015.png", folder / "strange.png")
    rows = [
        {"file_name": name, "label": "malignant", "split": "test"}
        for name in ("mirrored.png", "strange.png")
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_training_that_saw_the_test_is_refused(
    dataset: Path, leaking: Path, tmp_path: Path
) -> None:
    clean = settings(dataset, tmp_path / "clean")
    items, _ = corpus.read(clean, KNOWN)
    held_out.check(clean, items)
    wrong = settings(dataset, tmp_path / "wrong", held_out=(leaking,))
    with pytest.raises(DatasetError) as error:
        held_out.check(wrong, items)
    # Its own six, and the other's two.
    assert "1 of 8 test pictures were seen by this training" in str(error.value)
    assert f"{leaking}/mirrored.png = {dataset}/003.png (near-duplicates" in str(error.value)


def test_what_was_seen_serves_later_tests(
    dataset: Path, leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = settings(dataset, tmp_path / "run")
    items, _ = corpus.read(run, KNOWN)
    held_out.check(run, items)
    seen = run.out / held_out.SEEN
    assert set(Index.load(seen).names) == {str(item.file) for item in items}
    assert curate.main(["leaks", str(leaking), "--seen", str(seen)]) == 1
    assert "mirrored.png" in capsys.readouterr().err
    # A run that goes on reads it; one of other pictures makes it anew.
    before = seen.read_bytes()
    held_out.check(run, items)
    assert seen.read_bytes() == before
    held_out.check(run, items[:3])
    assert len(Index.load(seen)) == 3
    seen.write_bytes(b"cut short")
    held_out.check(run, items)
    assert len(Index.load(seen)) == len(items)


def test_an_index_of_what_files_were_before_is_not_used(
    dataset: Path, leaking: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(dataset, tmp_path / "data")
    run = settings(folder, tmp_path / "run")
    items, _ = corpus.read(run, KNOWN)
    held_out.check(run, items)
    # Same name, another picture: one of the test.
    shutil.copy(leaking / "strange.png", items[0].file)
    changed, _ = corpus.read(run, KNOWN)
    wrong = settings(folder, tmp_path / "run", split="test", held_out=(leaking,))
    with pytest.raises(DatasetError, match=r"strange.png = .*/000.png \(near"):
        held_out.check(wrong, changed)
    # Same picture, whose patient is known now: one of the test's.
    record = replace(items[1].record, group="patient 7")
    grouped = [items[1], replace(items[2], record=record)]
    held_out.check(wrong, grouped[:1])
    rows = [{"file_name": "strange.png", "label": "malignant", "split": "test",
             "group": "patient 7"}]  # fmt: skip
    (leaking / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [items[1], items[2]]
    held_out.check(wrong, plain)
    with pytest.raises(DatasetError, match="both are of group patient 7"):
        held_out.check(wrong, grouped)


def test_a_picture_that_cannot_be_read_does_not_make_the_index_anew(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(dataset, tmp_path / "data")
    run = settings(folder, tmp_path / "run")
    items, _ = corpus.read(run, KNOWN)
    whole = items[0].file.read_bytes()
    items[0].file.write_bytes(whole[: len(whole) // 2])
    items, _ = corpus.read(run, KNOWN)
    held_out.check(run, items)
    assert len(Index.load(run.out / held_out.SEEN)) == len(items) - 1

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(leaks, "look", never)
    monkeypatch.setattr(leaks, "index", lambda *_: Index.load(run.out / held_out.SEEN))
    monkeypatch.setattr(leaks, "refuse", lambda *_, **__: None)
    held_out.check(run, items)


def test_only_a_test_that_is_trained_on_is_given_up(
    dataset: Path, leaking: Path, tmp_path: Path
) -> None:
    run = settings(dataset, tmp_path / "run", split="test")
    items, _ = corpus.read(run, KNOWN)
    held_out.check(run, items)
    with pytest.raises(DatasetError, match="1 of 2 test pictures were seen by this training"):
        held_out.check(replace(run, held_out=(leaking,)), items)


def test_only_some_pictures(dataset: Path, tmp_path: Path) -> None:
    chosen = settings(dataset, tmp_path / "run", only=("label=malignant", "source=drawn"))
    items, _ = corpus.read(chosen, KNOWN)
    assert len(items) == 4
    assert {item.record.label for item in items} == {"malignant"}
    none = settings(dataset, tmp_path / "run", only=("diagnosis=melanoma",))
    with pytest.raises(DatasetError, match="no picture in split 'train' with diagnosis=melanoma"):
        corpus.read(none, KNOWN)
    for wrong in ("melanoma", "diagnosis=", "colour=black"):
        with pytest.raises(SettingsError, match="is no KEY=WORD; KEY is one of label, diagnosis"):
            settings(dataset, tmp_path / "run", only=(wrong,))
