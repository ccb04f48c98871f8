"""Pictures of a dataset that are signed: the same pixels, every file, whatever comes between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermaflux.images import read_marks
from dermaflux.marks import Marker, MarksError
from dermaflux.marks.registry import RegistryError
from serving.batch.__main__ import main
from serving.batch.journal import Journal
from serving.batch.marked import VARIABLE, opened
from serving.batch.store import DiskFull
from tests.batch.test_work import Picky, items, pictures, run

BUNDLE = "0a1b2c3d4e5f6071"


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    found = opened(tmp_path / "marks", BUNDLE, {})
    assert found is not None
    return found


def pixels(path: Path) -> dict[str, bytes]:
    return {name: np.asarray(Image.open(path / name)).tobytes() for name in pictures(path)}


def test_every_picture_is_signed_and_has_the_pixels_that_it_has_without(
    fake_pipeline, tmp_path, marker
) -> None:
    wanted = items(fake_pipeline, 7)
    more = {"gate": Picky(2), "attempts": 2, "batch": 3}
    run(fake_pipeline, tmp_path / "bare", wanted, **more)
    _, ledger = run(fake_pipeline, tmp_path / "signed", wanted, marker=marker, **more)
    assert pixels(tmp_path / "signed") == pixels(tmp_path / "bare")
    files = pictures(tmp_path / "signed")
    assert any(name.startswith("__rejected__") for name in files)
    for name, data in files.items():
        verdict = marker.verify(data, crops=False)
        assert (verdict.manifest.state, verdict.manifest.trusted, verdict.known) == (
            "valid", True, True,
        )  # fmt: skip
        record = verdict.manifest.record
        assert verdict.exact, name
        assert (record["bundle"], record["watermark"]) == (BUNDLE, False)
        assert record["seed"] == read_marks(data)["dermaflux.seed"]
        assert "prompt" not in record
        assert "prompt_hmac_sha256" in record
    for entry in ledger.kept.values():
        data = files[entry.file]
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_job_that_was_killed_goes_on_and_all_is_signed(
    fake_pipeline, tmp_path, marker, monkeypatch
) -> None:
    wanted = items(fake_pipeline, 9)
    whole, calls = Journal.append, []

    def killed(journal: Journal, entries) -> None:
        calls.append(len(entries))
        if len(calls) == 2:  # its files are there, its lines are not
            raise KeyboardInterrupt
        whole(journal, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run(fake_pipeline, tmp_path / "job", wanted, batch=3, marker=marker)
    # What was denoised beside it was written all the same.
    count, ledger = run(fake_pipeline, tmp_path / "job", wanted, batch=2, marker=marker)
    assert count.kept == 3
    assert len(ledger.kept) == 9
    run(fake_pipeline, tmp_path / "bare", wanted)
    assert pixels(tmp_path / "job") == pixels(tmp_path / "bare")
    assert all(marker.verify(one, crops=False).exact for one in pictures(tmp_path / "job").values())


def test_what_cannot_be_registered_is_not_done(
    fake_pipeline, tmp_path, marker, monkeypatch
) -> None:
    wanted = items(fake_pipeline, 4)

    def full(registry, *hashes: str) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RegistryError("takes no more") from error

    with monkeypatch.context() as patch:
        patch.setattr(type(marker.registry), "add", full)
        with pytest.raises(DiskFull, match="Free space and run the same command again"):
            run(fake_pipeline, tmp_path / "job", wanted, marker=marker)
    count, _ = run(fake_pipeline, tmp_path / "job", wanted, marker=marker)
    assert count.kept == 4


def test_a_certificate_that_has_ended_signs_nothing(fake_pipeline, tmp_path, marker) -> None:
    over = datetime.now(UTC) - timedelta(days=1)
    keys = replace(marker.keys, signer=replace(marker.keys.signer, not_after=over))
    ended = Marker(keys, marker.registry, BUNDLE, watermark=False)
    with pytest.raises(MarksError, match="put another certificate there"):
        run(fake_pipeline, tmp_path / "job", items(fake_pipeline, 2), marker=ended)
    assert pictures(tmp_path / "job") == {}


def test_the_folder_is_named_by_option_or_environment(tmp_path) -> None:
    assert opened(None, BUNDLE, {}) is None
    assert opened(None, BUNDLE, {VARIABLE: " "}) is None
    named = opened(None, BUNDLE, {VARIABLE: str(tmp_path / "theirs")})
    assert named is not None
    assert named.registry.path.parent == tmp_path / "theirs"
    option = opened(tmp_path / "ours", BUNDLE, {VARIABLE: str(tmp_path / "theirs")})
    assert option is not None
    assert option.keys.chain != named.keys.chain
    (tmp_path / "file").touch()
    with pytest.raises(MarksError):
        opened(tmp_path / "file/below", BUNDLE, {})


def test_the_command_signs(tiny_bundle, tmp_path, capsys, monkeypatch) -> None:
    asked = tmp_path / "requests.jsonl"
    lines = [{"lesion": {"label": "benign"}, "steps": 2} for _ in range(5)]
    asked.write_text("".join(json.dumps(one) + "\n" for one in lines))
    words = [str(asked), "--bundle", str(tiny_bundle.path), "--threads", "1", "--gate", "off"]
    marks = tmp_path / "marks"
    monkeypatch.setenv(VARIABLE, str(marks))
    assert main([*words, "--out", str(tmp_path / "by-environment")]) == 0
    monkeypatch.delenv(VARIABLE)
    assert main([*words, "--out", str(tmp_path / "by-option"), "--marks", str(marks)]) == 0
    assert main([*words, "--out", str(tmp_path / "bare")]) == 0
    site = Marker.open(marks, tiny_bundle.id)
    for name in ("by-environment", "by-option"):
        assert pixels(tmp_path / name) == pixels(tmp_path / "bare")
        for data in pictures(tmp_path / name).values():
            verdict = site.verify(data, crops=False)
            assert (verdict.exact, verdict.known) == (True, True)
            assert verdict.manifest.record["bundle"] == tiny_bundle.id
    assert {len(one) for one in pictures(tmp_path / "bare").values()} != {
        len(one) for one in pictures(tmp_path / "by-option").values()
    }
    # It is the same job, and whole: nothing is drawn or written again.
    capsys.readouterr()
    before = pictures(tmp_path / "by-option")
    again = [*words, "--out", str(tmp_path / "by-option"), "--verify"]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"] == 0
    assert pictures(tmp_path / "by-option") == before
    wrong = [*words, "--out", str(tmp_path / "none"), "--marks", str(asked / "below")]
    assert main(wrong) == 2
    assert not (tmp_path / "none").exists()
