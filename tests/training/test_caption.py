"""The captioner's run: journal, resume, parts; attributes; import; the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermaflux import dataset
from dermaflux.dataset import Record
from dermaflux.errors import DatasetError
from training import caption, caption_import
from training.caption_attributes import AttributeCaptioner
from training.caption_journal import Journal, Line, key
from training.caption_run import Answer, Failed, Picture, run
from training.caption_text import Asking, patient_sentence, text_of

PICTURES = 10


class Parrot:
    """Says a picture's name; `bad` ones fail, and `killed` stops the run in its place."""

    batch = 2

    def __init__(self, bad: Sequence[str] = (), killed: str = "") -> None:
        self.bad, self.killed = bad, killed
        self.asked: list[str] = []

    def key(self, picture: Picture) -> str:
        return key("parrot", picture.sha256)

    def answer(self, pictures: Sequence[Picture]) -> list[Answer]:
        names = [picture.record.file_name for picture in pictures]
        if self.killed in names:
            signal.raise_signal(signal.SIGKILL)
        self.asked += names
        return [Failed("is bad") if name in self.bad else {"text": name} for name in names]

    def captioned(self, record: Record, answer: Mapping[str, Any]) -> Record:
        return replace(record, text=f"says {answer['text']}")


def lesion(folder: Path, name: str, radius: int = 20, shade: int = 60) -> Image.Image:
    rows, columns = np.mgrid[:96, :96]
    inside = np.hypot(rows - 48, columns - 48) < radius
    pixels = np.full((96, 96, 3), (226, 188, 168), dtype=np.uint8)
    pixels[inside] = (shade, shade // 2, shade // 3)
    Image.fromarray(pixels).save(folder / name)
    return Image.fromarray(inside)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    records = []
    for number in range(PICTURES):
        lesion(folder, f"{number}.png", radius=10 + 2 * number)
        records.append(Record(f"{number}.png", "benign", text="before", more={"kept": number}))
    dataset.write(folder, records)
    return folder


def texts(folder: Path) -> list[str]:
    return [record.text for record in dataset.read(folder)]


def test_the_papers_text() -> None:
    record = Record("7.jpg", "malignant", sex="female", age=80)
    assert text_of(record, "It has {text} and {label}.") == (
        "This photo depicts a malignant lesion. This photo is taken from a female patient, who is "
        "80.0 years old. Here's a description of the mole: \n\nIt has {text} and {label}."
    )
    assert patient_sentence(Record("7.jpg", "benign")) == ""
    assert patient_sentence(Record("7.jpg", "benign", sex="male")) == (
        "This photo is taken from a male patient. "
    )
    assert text_of(record, "Round.", patient=False).startswith(
        "This photo depicts a malignant lesion. Here's"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "A {colour} lesion"}, "colour"),
        ({"template": "A lesion"}, "{text}"),
        ({"temperature": -1.0}, "-1.0"),
        ({"top_p": 0.0}, "--top-p"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        Asking("model", **values)


def test_bad_pictures_fail_no_other_and_are_tried_again(folder: Path) -> None:
    (folder / "5.png").unlink()
    summary = run(folder, Parrot(bad=("2.png",)))
    assert (summary["captioned"], summary["failed"]) == (8, 2)
    assert summary["failures"].keys() == {"2.png", "5.png"}
    assert texts(folder)[2] == texts(folder)[5] == "before"
    assert texts(folder)[3] == "says 3.png"
    assert dataset.read(folder)[3].more["kept"] == 3
    again = Parrot()
    assert run(folder, again)["new"] == 1
    assert again.asked == ["2.png"]
    assert texts(folder)[2] == "says 2.png"


def test_where_nothing_succeeds_the_run_stops_and_writes_nothing(folder: Path) -> None:
    before = (folder / "metadata.jsonl").read_bytes()
    with pytest.raises(DatasetError, match=r"0\.png: is bad"):
        run(folder, Parrot(bad=[f"{number}.png" for number in range(PICTURES)]))
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_killed_a_run_loses_one_batch_at_most(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.caption_run import run; "
        "from tests.training.test_caption import Parrot; "
        "run(Path(sys.argv[1]), Parrot(killed='6.png'))"
    )
    before = (folder / "metadata.jsonl").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "metadata.jsonl").read_bytes() == before
    again = Parrot()
    assert run(folder, again)["captioned"] == PICTURES
    assert again.asked == ["6.png", "7.png", "8.png", "9.png"]
    assert texts(folder) == [f"says {number}.png" for number in range(PICTURES)]


def test_a_line_cut_off_anywhere_is_asked_again_and_the_rest_is_not(folder: Path) -> None:
    run(folder, Parrot())
    journal = folder / "captions.jsonl"
    whole = journal.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for left in (1, last // 2, last - 1):
        journal.write_bytes(whole[: len(whole) - last + left])
        again = Parrot()
        assert run(folder, again)["captioned"] == PICTURES
        assert again.asked == ["9.png"]
        assert journal.read_bytes() == whole
    journal.write_bytes(whole.replace(b'"0.png"', b'"0.png', 1))
    again = Parrot()
    run(folder, again)
    assert again.asked == ["0.png"]


def test_a_full_disk_takes_its_half_batch_back(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.append([Line("a", "0.png", {"text": "one"})])
        whole = journal.file.read_bytes()
        stream = journal._stream

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

            def write(self, data: bytes) -> int:
                stream.write(data[:9])
                stream.flush()
                raise OSError(28, "No space left on device")

        journal._stream = Full()  # type: ignore[assignment]
        with pytest.raises(OSError, match="space"):
            journal.append([Line("b", "1.png", {"text": "two"})])
        assert journal.file.read_bytes() == whole
        assert journal.answer("b") is None


def test_two_runs_do_not_write_one_journal(folder: Path) -> None:
    with Journal(folder), pytest.raises(DatasetError, match="another run"):
        run(folder, Parrot())


def test_parts_share_the_work_and_the_whole_writes_it(folder: Path) -> None:
    before = texts(folder)
    first, second, last = Parrot(), Parrot(), Parrot()
    assert run(folder, first, (1, 2))["written"] is False
    run(folder, second, (2, 2))
    assert texts(folder) == before
    assert sorted(first.asked + second.asked) == sorted(f"{n}.png" for n in range(PICTURES))
    assert run(folder, last)["new"] == 0
    assert texts(folder) == [f"says {number}.png" for number in range(PICTURES)]


def test_what_others_change_meanwhile_is_kept(folder: Path) -> None:
    class Meddler(Parrot):
        def answer(self, pictures: Sequence[Picture]) -> list[Answer]:
            records = dataset.read(folder)
            changed = [replace(records[0], label="malignant"), *records[1:]]
            dataset.write(folder, [*changed[:9], Record("new.png", "benign")])
            return super().answer(pictures)

    run(folder, Meddler())
    records = dataset.read(folder)
    assert (records[0].label, records[0].text) == ("malignant", "before")
    assert records[1].text == "says 1.png"
    assert [record.file_name for record in records[8:]] == ["8.png", "new.png"]


def test_measured_words_go_into_record_and_caption(folder: Path) -> None:
    mask = lesion(folder, "0.png", radius=12)
    mask.resize((192, 192)).save(folder / "mask.png")
    records = dataset.read(folder)
    dataset.write(folder, [replace(records[0], mask="mask.png"), *records[1:]])
    assert caption.main([str(folder), "--attributes", "--jobs", "1"]) == 0
    with_mask, without = dataset.read(folder)[0], dataset.read(folder)[6]
    assert with_mask.text == (
        "dermoscopic image of a benign lesion, symmetric, dark brown, small in the field"
    )
    assert (with_mask.asymmetry, with_mask.border, with_mask.size) == ("symmetric", None, "small")
    assert with_mask.colors == ("dark brown",)
    assert with_mask.more["measured"]["by"] == "mask"
    assert without.more["measured"]["by"] == "segmentation"
    assert without.more["measured"]["attributes"] == ["asymmetry", "colors", "size"]
    assert without.more["kept"] == 6
    assert "clinical" not in json.dumps(without.to_mapping())


def test_own_words_stay_and_measured_ones_give_way(folder: Path) -> None:
    own = Record("7.png", "benign", asymmetry="asymmetric", border="irregular", size="small")
    dataset.write(folder, [own])
    run(folder, AttributeCaptioner(folder))
    record = dataset.read(folder)[0]
    assert record.text == (
        "dermoscopic image of a benign lesion, asymmetric, dark brown, small in the field"
    )
    assert record.border == "irregular"
    assert record.more["measured"]["attributes"] == ["colors"]
    run(folder, AttributeCaptioner(folder, border=True))
    assert "irregular border" in dataset.read(folder)[0].text
    # Measured words are measured anew where the picture has changed, and a border that is not
    # asked for any more goes.
    dataset.write(folder, [Record("7.png", "benign")])
    run(folder, AttributeCaptioner(folder, border=True))
    assert dataset.read(folder)[0].border == "regular"
    lesion(folder, "7.png", radius=10, shade=40)
    run(folder, AttributeCaptioner(folder))
    record = dataset.read(folder)[0]
    assert (record.border, record.colors, record.size) == (None, ("black",), "small")


def test_records_that_have_all_words_are_not_opened(folder: Path) -> None:
    full = Record("7.png", "benign", asymmetry="symmetric", colors=("black",), size="large")
    dataset.write(folder, [replace(full, sha256="0" * 64)])
    (folder / "7.png").unlink()
    run(folder, AttributeCaptioner(folder))
    record = dataset.read(folder)[0]
    assert record.text == (
        "dermoscopic image of a benign lesion, symmetric, black, large in the field"
    )
    assert "measured" not in record.more


def test_a_mask_of_other_proportions_fails_its_picture(folder: Path) -> None:
    Image.new("L", (96, 48)).save(folder / "mask.png")
    records = dataset.read(folder)
    (folder / "broken.png").write_bytes(b"no picture")
    masks = [replace(records[0], mask="mask.png"), replace(records[1], mask="broken.png")]
    dataset.write(folder, [*masks, *records[2:]])
    summary = run(folder, AttributeCaptioner(folder))
    assert summary["failures"].keys() == {"0.png", "1.png"}
    assert "proportions" in summary["failures"]["0.png"]
    assert "mask" in summary["failures"]["1.png"]


def test_two_processes_measure_what_one_does(folder: Path) -> None:
    pictures = [Picture(record, record.file_name) for record in dataset.read(folder)]
    two = AttributeCaptioner(folder, jobs=2)
    try:
        assert two.answer(pictures) == AttributeCaptioner(folder).answer(pictures)
    finally:
        two.close()


@pytest.mark.parametrize(
    "content",
    [
        {"0.png": "one", "dataset/1": "two", "zzz.jpg": "three"},
        [{"file_name": "0.png", "text": "one"}, {"image": "1.jpg", "caption": "two"},
         {"image": "zzz.jpg", "text": "three"}],
    ],
)  # fmt: skip
def test_captions_from_elsewhere(
    folder: Path, tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "isic2020.json"
    file.write_text(json.dumps(content))
    assert caption.main([str(folder), "--import", str(file)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["captioned"], summary["without"]) == (2, PICTURES - 2)
    assert summary["unknown"] == {"count": 1, "first": ["zzz.jpg"]}
    assert texts(folder)[:3] == ["one", "two", "before"]
    told = dataset.read(folder)[0].more["caption"]
    assert (told["captioner"], told["file"], len(told["sha256"])) == ("import", file.name, 64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no json", "JSON"),
        ('"a text"', "str 'a text'"),
        ("{}", "no caption"),
        ('[{"id": 1, "answer": "x"}]', "'id', 'answer'"),
        ('{"0.png": {"text": "one"}}', "'text'"),
        ('[{"image": "a", "text": "x"}, {"image": "a", "text": "y"}]', "another text"),
        ('{"zzz.png": "one"}', "'zzz.png'"),
    ],
)
def test_another_schema_is_told(folder: Path, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(DatasetError, match=words):
        caption.run_import(folder, file)


def test_a_name_that_two_records_share_is_no_match() -> None:
    records = [Record("a/7.jpg", "benign"), Record("b/7.jpg", "benign"), Record("8.jpg", "benign")]
    matched = caption_import.matches(records, {"7.jpg": "x", "b/7.jpg": "y", "8": "z"})
    assert matched.found == {"b/7.jpg": "y", "8.jpg": "z"}
    assert matched.ambiguous == ("7.jpg",)


def test_options_of_another_mode_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (
        ["--attributes", "--label-blind"],
        ["--check", "--border"],
        ["--attributes", "--check"],
        ["--attributes", "--part", "3/2"],
        [],
    ):
        with pytest.raises(SystemExit):
            caption.main([str(folder), *wrong])
    assert "--label-blind goes with --model only" in capsys.readouterr().err
    assert caption.main([str(folder / "none"), "--attributes"]) == 2


def test_an_empty_text_takes_no_other_ones_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"0.png": "one", "1.png": " \n", "2.png": ""}))
    assert caption.main([str(folder), "--import", str(file)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["captioned"], summary["without"], summary["failed"]) == (1, PICTURES - 1, 2)
    assert summary["failures"] == dict.fromkeys(("1.png", "2.png"), "its text is empty")
    assert texts(folder)[:3] == ["one", "before", "before"]
    assert "caption" not in dataset.read(folder)[1].more
    file.write_text(json.dumps({"1.png": ""}))
    with pytest.raises(DatasetError, match="all 1 texts of .* are empty"):
        caption.run_import(folder, file)
