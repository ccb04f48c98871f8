"""The command as a whole, on a bundle of hand-made graphs."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermaflux import dataset, files
from dermaflux.bundle import Bundle, sha256
from dermaflux.images import SOURCE_TYPE, read_marks
from serving.batch.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def line(index: int, **more: Any) -> dict[str, Any]:
    lesion = {
        "label": ("benign", "malignant")[index % 2],
        "size": ("small", "large")[index // 2 % 2],
    }
    return {"lesion": lesion, "steps": 2, **more}


def write(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return file


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write(tmp_path / "requests.jsonl", [line(index) for index in range(20)])


@pytest.fixture
def run(tiny_bundle: Bundle, capsys):
    """The command; what it prints as its result, with its `status`."""

    def call(requests: Path, out: Path, *more: str) -> dict[str, Any]:
        status = main([str(requests), "--bundle", str(tiny_bundle.path), "--out", str(out),
                       "--threads", "1", "--gate", "off", *more])  # fmt: skip
        said = capsys.readouterr()
        result = json.loads(said.out.splitlines()[-1]) if said.out.strip() else {}
        return {**result, "status": status, "said": said.err}

    return call


def made(out: Path) -> dict[str, Any]:
    """All that a job made, without times."""
    found: dict[str, Any] = {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and ".batch" not in file.parts
    }
    for name in ("metadata.jsonl", "rejected.jsonl", "failed.jsonl"):
        rows = [json.loads(one) for one in found[name].decode().splitlines()]
        found[name] = [{k: v for k, v in row.items() if k != "created"} for row in rows]
    return found


def test_a_job_is_a_dataset(run, asked: Path, tmp_path: Path, tiny_bundle: Bundle) -> None:
    out = tmp_path / "out"
    result = run(asked, out)
    assert (result["status"], result["kept"], result["with_others"]) == (0, 20, 0)
    records = dataset.read(out)
    assert len(records) == 20
    for index, record in enumerate(records):
        file = out / record.file_name
        assert sha256(file) == record.sha256
        assert record.lesion.size == ("small", "large")[index // 2 % 2]
        assert record.label == ("benign", "malignant")[index % 2]
        assert record.more["bundle"] == tiny_bundle.id
        marks = read_marks(file.read_bytes())
        assert marks["DigitalSourceType"] == SOURCE_TYPE
        assert marks["dermaflux.seed"] == str(record.more["seed"])
        assert marks["dermaflux.prompt"] == record.text
    assert len({record.more["seed"] for record in records}) == 20
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kept_by_label"] == {"benign": 10, "malignant": 10}
    (engine,) = manifest["engines"]
    assert {record.more["engine"] for record in records} == {engine}
    assert not list((out / ".batch/tmp").rglob("*.png*"))


def test_another_seed_draws_others_and_a_given_seed_is_kept(run, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(0), line(1, seed=7)])
    for seed in ("0", "1"):
        run(asked, tmp_path / seed, "--seed", seed)
    one, other = (dataset.read(tmp_path / seed) for seed in ("0", "1"))
    assert one[0].sha256 != other[0].sha256
    assert one[1].sha256 == other[1].sha256
    assert one[1].more["seed"] == 7


def test_shards_together_are_one_run(run, asked: Path, tmp_path: Path) -> None:
    run(asked, tmp_path / "whole")
    for number in (2, 3, 1):
        assert not (tmp_path / "shared/metadata.jsonl").exists()
        result = run(asked, tmp_path / "shared", "--shard", f"{number}/3", "--batch", str(number))
    assert result["kept"] == 20
    assert made(tmp_path / "shared") == made(tmp_path / "whole")


def test_shards_in_folders_of_their_own_are_copied_together(run, asked, tmp_path: Path) -> None:
    run(asked, tmp_path / "whole")
    for number in (1, 2, 3):
        run(asked, tmp_path / str(number), "--shard", f"{number}/3")
        shutil.copytree(tmp_path / str(number), tmp_path / "all", dirs_exist_ok=True)
    result = run(asked, tmp_path / "all")
    assert result["drawn"] == 0
    assert made(tmp_path / "all") == made(tmp_path / "whole")


def test_another_engine_draws_within_tolerance(run, asked: Path, tmp_path: Path) -> None:
    for engine in ("onnxruntime-cpu", "openvino-cpu"):
        run(asked, tmp_path / engine, "--engine", engine)
    one, other = (dataset.read(tmp_path / name) for name in ("onnxruntime-cpu", "openvino-cpu"))
    assert one[0].more["engine"] != other[0].more["engine"]
    for a, b in zip(one, other, strict=True):
        pixels = [
            np.asarray(Image.open(tmp_path / name / record.file_name)).astype(int)
            for name, record in (("onnxruntime-cpu", a), ("openvino-cpu", b))
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_job_may_end_on_another_engine(run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(asked, out, "--shard", "1/2", "--engine", "onnxruntime-cpu")
    run(asked, out, "--shard", "2/2", "--engine", "openvino-cpu")
    engines = json.loads((out / "manifest.json").read_text())["engines"]
    assert sorted(engine["kept"] for engine in engines.values()) == [10, 10]
    assert {part["engine"] for engine in engines.values() for part in engine["parts"].values()} == {
        "onnxruntime-cpu", "openvino-cpu",
    }  # fmt: skip


def test_bad_lines_are_told_and_mended_lines_are_drawn(run, tmp_path: Path) -> None:
    good = [line(index) for index in range(6)]
    mixed: list[Any] = [*good[:2], "{broken", *good[3:5], {"lesion": {"label": "odd"}}]
    asked = write(tmp_path / "r.jsonl", mixed)
    result = run(asked, tmp_path / "out")
    assert (result["status"], result["kept"], result["bad_lines"]) == (1, 4, 2)
    told = [json.loads(one) for one in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [one["line"] for one in told] == [3, 6]
    write(asked, good)
    assert run(asked, tmp_path / "out")["drawn"] == 2
    run(write(tmp_path / "all.jsonl", good), tmp_path / "whole")
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_what_is_there_is_not_drawn_again_and_what_is_missing_is(run, asked, tmp_path) -> None:
    out = tmp_path / "out"
    run(asked, out)
    before = made(out)
    assert run(asked, out)["drawn"] == 0
    (out / "images/0000/0000003.png").unlink()
    damaged = out / "images/0000/0000005.png"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    result = run(asked, out, "--verify")
    assert result["drawn"] == 2
    assert made(out) == before


def test_a_job_is_not_mixed_with_another(run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(asked, out)
    before = made(out)
    for more, told in (
        (["--seed", "1"], "--seed: 0 there, 1 now"),
        (["--attempts", "2"], "--attempts: 1 there, 2 now"),
    ):
        result = run(asked, out, *more)
        assert result["status"] == 2
        assert told in result["said"]
    write(asked, [line(0, steps=3), *(line(index) for index in range(1, 20))])
    result = run(asked, out)
    assert result["status"] == 2
    assert "'0000000' was drawn of another request" in result["said"]
    assert made(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").write_text("years of work")
    assert "no job of this kind" in run(asked, tmp_path / "full")["said"]


def test_lines_may_be_added(run, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(3)])
    run(asked, tmp_path / "out")
    write(asked, [line(index) for index in range(5)])
    assert run(asked, tmp_path / "out")["drawn"] == 2
    assert len(dataset.read(tmp_path / "out")) == 5


def test_a_full_disk_stops_cleanly_and_the_job_goes_on(run, asked, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    real, written = files.write, list[Path]()

    def full(path: Path, data: bytes, within: Path | None = None) -> None:
        if path.suffix == ".png":
            written.append(path)
            if len(written) > 9:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, within)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        result = run(asked, out, "--batch", "2")
    assert result["status"] == 3
    assert "is full" in result["said"]
    assert "Traceback" not in result["said"]
    assert not (out / "metadata.jsonl").exists()
    assert len(list(out.rglob("images/*/*.png"))) == 9
    assert run(asked, out)["kept"] == 20
    run(asked, tmp_path / "whole")
    assert made(out) == made(tmp_path / "whole")


def test_options_that_contradict_are_refused(run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more, told in (
        (["--plan", "p.yaml"], "not both"),
        (["--attempts", "0"], "--attempts: 0 is out of range"),
        (["--batch", "0"], "--batch"),
        (["--seed", "-1"], "--seed"),
        (["--shard", "4/3"], "4/3"),
        (["--seen", "x.npz"], "--seen"),
    ):
        result = run(asked, out, *more)
        assert result["status"] == 2, more
        assert told in result["said"]
        assert not out.exists()


def test_a_rehearsal_writes_nothing(run, asked: Path, tmp_path: Path) -> None:
    result = run(asked, tmp_path / "out", "--dry-run", "--shard", "1/2")
    assert (result["status"], result["pictures"], result["of"]) == (0, 10, 20)
    assert result["bytes"] > 0
    assert result["seconds_per_picture"] > 0
    for figures in result["memory"].values():
        assert 0 < figures["peak"] < figures["available"]
    assert not (tmp_path / "out").exists()


def test_further_forms_are_written(run, asked: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    out = tmp_path / "out"
    run(asked, out, "--webdataset", "8", "--parquet")
    assert len(list((out / "shards").glob("*.tar"))) == 3
    table = pyarrow.parquet.read_table(out / "dataset.parquet")
    assert table.column("sha256").to_pylist() == [one.sha256 for one in dataset.read(out)]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Thresholds that look for copies alone: the tiny bundle's pictures show no lesion."""
    file = tmp_path / "gate.yaml"
    file.write_text("agreement: none\nattributes: none\ncopies: 0.7\n")
    return file


def test_the_first_of_copies_stays_whoever_drew_it(run, gate, tmp_path, monkeypatch) -> None:
    """Small and large are one lesion here: every item has a twin two places further on."""
    from serving.batch import copies

    def find(pictures, threshold=0.7, threads=2, shown=iter):
        names = [name for name, file in pictures if file.is_file()]
        return {b: (a, 0.9) for a, b in zip(names[::2], names[1::2], strict=False)}

    monkeypatch.setattr(copies, "find", find)
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(9)] + [line(9, seed=3)])
    result = run(asked, tmp_path / "one", f"--gate={gate}")
    assert (result["kept"], result["rejected"], result["copies"]) == (6, 4, 4)
    for number in (2, 1):
        run(asked, tmp_path / "two", f"--gate={gate}", f"--shard={number}/2")
    assert made(tmp_path / "one") == made(tmp_path / "two")
    reasons = [json.loads(x) for x in (tmp_path / "one/rejected.jsonl").read_text().splitlines()]
    assert reasons[0]["id"] == "0000001"
    assert "it is 0000000 again (similarity 0.90" in reasons[0]["reasons"][0]
    assert (tmp_path / "one" / reasons[0]["file"]).is_file()
    # A line is added, and what are copies changes: pictures move both ways, none is drawn anew.
    monkeypatch.setattr(copies, "find", lambda *_: {"0000002": ("0000000", 0.8)})
    write(asked, [line(index) for index in range(9)] + [line(9, seed=3), line(10)])
    result = run(asked, tmp_path / "one", f"--gate={gate}")
    assert (result["drawn"], result["kept"], result["copies"]) == (1, 10, 1)
    assert {record.more["id"] for record in dataset.read(tmp_path / "one")} == {
        f"{index:07d}" for index in range(11) if index != 2
    }
    assert all((tmp_path / "one" / r.file_name).is_file() for r in dataset.read(tmp_path / "one"))


def test_a_picture_that_another_share_lost_is_waited_for(run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        run(asked, out, f"--shard={number}/2")
    before = made(out)
    (out / "images/0000/0000001.png").unlink()
    result = run(asked, out, "--shard=1/2")
    assert (result["status"], result["with_others"], result["drawn"]) == (0, 1, 0)
    assert run(asked, out, "--shard=2/2")["drawn"] == 1
    assert made(out) == before


def test_a_verdict_that_changed_takes_the_picture_out(run, gate, tmp_path, monkeypatch) -> None:
    """As when another engine draws a lost picture anew, and the gate sees it otherwise."""
    from serving.batch import copies
    from serving.batch.gate import Gate, Verdict

    monkeypatch.setattr(copies, "find", lambda *_: {})
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(4)])
    out = tmp_path / "out"
    run(asked, out, f"--gate={gate}")
    (out / "images/0000/0000002.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "judge", lambda _, items, __: [Verdict(("no",), {}) for _ in items])
        assert run(asked, out, f"--gate={gate}")["kept"] == 3
    rejected = [json.loads(x) for x in (out / "rejected.jsonl").read_text().splitlines()]
    assert [one["id"] for one in rejected] == ["0000002"]
    assert (out / rejected[0]["file"]).is_file()
    assert "0000002" not in {record.more["id"] for record in dataset.read(out)}
    assert run(asked, out, f"--gate={gate}")["drawn"] == 0


@pytest.mark.parametrize("place", ["journal", "sweep", "engine", "lists", "manifest"])
def test_a_disk_full_anywhere_is_told_as_such(run, asked, tmp_path, monkeypatch, place) -> None:
    from serving.batch import finish
    from serving.batch.job import Folder

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target, name = {
        "journal": (os, "open"), "sweep": (Folder, "sweep"), "engine": (Folder, "tell_engine"),
        "lists": (finish, "write_lists"), "manifest": (dataset, "write"),
    }[place]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        result = run(asked, tmp_path / "out")
    assert result["status"] == 3
    assert "is full" in result["said"]
    assert run(asked, tmp_path / "out")["kept"] == 20


def test_while_pictures_move_there_is_no_dataset(run, gate, tmp_path, monkeypatch) -> None:
    from serving.batch import copies, finish

    monkeypatch.setattr(copies, "find", lambda *_: {})
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(6)])
    out = tmp_path / "out"
    run(asked, out, f"--gate={gate}", "--parquet")
    write(asked, [line(index) for index in range(7)])
    real = finish._move

    def killed(path: Path, wanted: Path) -> None:
        real(path, wanted)
        if path != wanted:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copies, "find", lambda *_: {"0000002": ("0000000", 0.8)})
        patch.setattr(finish, "_move", killed)
        assert run(asked, out, f"--gate={gate}")["status"] == 130
        assert not (out / "metadata.jsonl").exists()
    result = run(asked, out, f"--gate={gate}")
    assert (result["kept"], result["drawn"]) == (7, 0)
    assert all((out / record.file_name).is_file() for record in dataset.read(out))


def test_a_finished_job_is_not_finished_again(run, asked, tmp_path, monkeypatch) -> None:
    from serving.batch import finish

    out = tmp_path / "out"
    first = run(asked, out, "--webdataset=8")
    monkeypatch.setattr(finish, "_sorted", None)
    again = run(asked, out)
    assert {**again, "drawn": 20, "seconds": 0, "pictures_per_second": 0} == {
        **first, "seconds": 0, "pictures_per_second": 0, "said": again["said"],
    }  # fmt: skip


def test_forms_of_an_earlier_run_are_kept_up(run, tmp_path: Path) -> None:
    import pyarrow.parquet

    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(8)])
    out = tmp_path / "out"
    run(asked, out, "--parquet", "--webdataset=4")
    write(asked, [line(index) for index in range(12)])
    run(asked, out)
    assert pyarrow.parquet.read_table(out / "dataset.parquet").num_rows == 12
    assert len(list((out / "shards").glob("*.tar"))) == 3


def test_bad_lines_are_told_by_who_finishes(run, tmp_path: Path) -> None:
    asked = write(tmp_path / "r.jsonl", [*(line(index) for index in range(6)), "{broken"])
    out = tmp_path / "out"
    assert run(asked, out, "--shard=1/2")["status"] == 0
    assert run(asked, out, "--shard=2/2")["status"] == 1


def test_a_label_that_comes_short_is_told(run, gate, tmp_path, monkeypatch) -> None:
    from serving.batch import copies
    from serving.batch.gate import Gate, Verdict

    monkeypatch.setattr(copies, "find", lambda *_: {})

    def judge(_, items, __):
        return [Verdict(("no",) if one.lesion.label == "benign" else (), {}) for one in items]

    monkeypatch.setattr(Gate, "judge", judge)
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(6)])
    result = run(asked, tmp_path / "out", f"--gate={gate}")
    assert result["asked_by_label"] == {"benign": 3, "malignant": 3}
    assert result["kept_by_label"] == {"malignant": 3}


def test_prompts_that_the_model_cuts_are_told(run, tmp_path: Path, caplog) -> None:
    long = {"prompt": "benign lesion " * 40, "label": "benign"}
    run(write(tmp_path / "r.jsonl", [line(0), long]), tmp_path / "out")
    assert "1 prompts are cut: 0000001 has" in caplog.text


def test_what_killed_processes_left_is_swept(run, asked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(asked, out, "--shard=2/2")
    for name in ("tmp/2-of-2/.x.png.abc", ".job.json.abc"):
        (out / ".batch" / name).write_bytes(b"half")
        os.utime(out / ".batch" / name, (0, 0))
    for name in (".dataset.parquet.abc", ".shards.part/a.tar"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"half")
    run(asked, out)
    left = [one.name for one in out.rglob("*") if one.is_file() and one.name.startswith(".")]
    assert left == []
    assert not (out / ".shards.part").exists()


def test_a_wrong_index_does_not_become_the_jobs(run, asked, gate, tmp_path: Path) -> None:
    (tmp_path / "junk.npz").write_bytes(b"junk")
    more = (f"--gate={gate}", f"--seen={tmp_path}/junk.npz")
    assert run(asked, tmp_path / "out", *more)["status"] == 2
    assert not (tmp_path / "out").exists()


def test_pictures_that_nobody_asks_for_any_more_are_told(run, tmp_path: Path, caplog) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index) for index in range(4)])
    run(asked, tmp_path / "out")
    write(asked, [line(index) for index in range(3)])
    assert run(asked, tmp_path / "out")["kept"] == 3
    assert "1 pictures that are not asked for any more" in caplog.text


def command(bundle: Bundle, requests: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "serving.batch", str(requests), "--bundle", str(bundle.path),
            "--out", str(out), "--threads=1", "--gate=off", "--batch=1", *more]  # fmt: skip


def pictures(out: Path) -> Iterator[Path]:
    return out.glob("images/*/*.png")


def started(command: list[str], out: Path, count: int) -> subprocess.Popen[str]:
    """The command, when it has drawn `count` pictures."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)  # fmt: skip
    until = time.monotonic() + 60
    while sum(1 for _ in pictures(out)) < count and process.poll() is None:
        assert time.monotonic() < until, "no picture after a minute"
        time.sleep(0.002)
    return process


def test_killed_at_random_moments_nothing_is_lost_or_doubled(run, tiny_bundle, tmp_path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(60)])
    run(asked, tmp_path / "whole")
    out, moments = tmp_path / "out", random.Random(0)
    for done in (0, 3, 20, 45):
        process = started(command(tiny_bundle, asked, out), out, done + moments.randrange(10))
        time.sleep(moments.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert run(asked, out)["kept"] == 60
    assert made(out) == made(tmp_path / "whole")
    assert not list((out / ".batch/tmp").rglob("*.png*"))


def test_sigterm_writes_what_is_denoised_and_says_how_to_go_on(run, tiny_bundle, tmp_path) -> None:
    asked = write(tmp_path / "r.jsonl", [line(index, steps=20) for index in range(400)])
    out = tmp_path / "out"
    process = started(command(tiny_bundle, asked, out), out, 3)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert "Traceback" not in said
    there = sum(1 for _ in pictures(out))
    assert 3 <= there < 400
    assert run(asked, out)["drawn"] == 400 - there
