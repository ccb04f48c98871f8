"""`python -m serving.verify`: what it says of files, what it returns, and that no file ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dermaflux.images import encode
from dermaflux.marks import Marker
from serving.verify import main
from tests.core.test_marks_watermark import picture

PIXELS = picture(128, 128, seed=8)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    marker = Marker.open(folder / "marks", "bundle one")
    (folder / "marked.png").write_bytes(marker.mark(PIXELS, {"seed": "7"}).data)
    with Image.open(folder / "marked.png") as one:
        one.convert("RGB").save(folder / "resaved.jpg", quality=60)
    (folder / "other.png").write_bytes(encode(picture(128, 128, seed=9), {"seed": "7"}))
    (folder / "cut.png").write_bytes((folder / "marked.png").read_bytes()[:5000])
    (folder / "text.png").write_text("this is no picture")
    return folder


def asked(capsys, site: Path, *names: str, options: tuple[str, ...] = ()) -> tuple[int, dict]:
    files = [str(site / name) for name in names]
    status = main([*files, "--marks", str(site / "marks"), *options])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(names) + 1
    return status, json.loads(out[-1])


def test_marked_files_are_shown_to_be_ours(capsys, site):
    status, told = asked(capsys, site, "marked.png", "resaved.jpg")
    assert (status, told["shown"], told["not_shown"], told["failed"]) == (0, 2, 0, 0)
    first, second = told["files"]
    assert (first["manifest"]["state"], first["pixels_known"]) == ("valid", True)
    assert (second["manifest"]["state"], second["pixels_known"]) == ("absent", False)
    assert first["watermark"]["present"] is second["watermark"]["present"] is True


def test_a_file_that_nothing_shows_is_status_1(capsys, site):
    status, told = asked(capsys, site, "marked.png", "other.png", options=("--no-crops",))
    assert (status, told["shown"], told["not_shown"]) == (1, 1, 1)
    assert told["files"][1]["claimed"] is True


def test_bad_files_stop_no_others(capsys, site):
    status, told = asked(capsys, site, "text.png", "cut.png", "none.png", "marked.png")
    assert (status, told["shown"], told["failed"]) == (2, 1, 3)
    assert [bool(one.get("error")) for one in told["files"]] == [True, True, True, False]
    assert told["files"][2]["error"] == "No such file or directory"


def test_without_marks_only_the_manifest_is_read(capsys, site, monkeypatch):
    monkeypatch.delenv("DERMAFLUX_MARKS", raising=False)
    assert main([str(site / "marked.png")]) == 1
    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert (told["manifest"]["state"], told["manifest"]["trusted"]) == ("valid", False)
    assert (told["pixels_known"], told["watermark"]) == (None, None)
    monkeypatch.setenv("DERMAFLUX_MARKS", str(site / "marks"))
    assert main([str(site / "marked.png")]) == 0


def test_no_keys_are_made_for_verifying(capsys, site, tmp_path):
    assert main([str(site / "marked.png"), "--marks", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_without_torch(site):
    code = (
        "import sys; from serving.verify import main;"
        f"status = main([{str(site / 'marked.png')!r}, '--marks', {str(site / 'marks')!r}]);"
        "print([n for n in ('torch', 'scipy', 'onnxruntime', 'bentoml') if n in sys.modules]);"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
