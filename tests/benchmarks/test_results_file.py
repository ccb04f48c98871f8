from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth, suite
from benchmarks.results_file import finish, keep
from dermaflux.bundle import Bundle


def test_a_result_names_its_command_machine_and_bundle(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/folder/result.json"
    whole = finish("latency", {"rows": [1, 2]}, ["--out", "a b"], out, tiny_bundle)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert json.loads(printed[0]) == json.loads(out.read_text()) == whole
    assert whole["benchmark"] == "latency"
    assert whole["command"] == "python -m benchmarks.latency --out 'a b'"
    assert whole["bundle"] == {"name": tiny_bundle.name, "id": tiny_bundle.id}
    assert whole["rows"] == [1, 2]
    assert {"processor", "load_before", "load_after"} <= set(whole["environment"])


def test_a_result_is_json_whatever_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"rows": [{"psnr_db": float("inf"), "seconds": (1.5, float("nan"))}]}
    plain = {"rows": [{"psnr_db": None, "seconds": [1.5, None]}]}
    keep("gpu", odd, tmp_path / "result.json")
    kept = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert kept == {"benchmark": "gpu", "unfinished": True, **plain}
    finish("gpu", odd, [], None)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["rows"] == plain["rows"]


@pytest.mark.parametrize("command", [suite, growth])
@pytest.mark.parametrize("out", ["file/result.json", "folder"])
def test_a_place_that_cannot_be_written_is_told_before_minutes_of_measuring(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], command, out: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    words = ["--bundle", str(tiny_bundle.path), "--checkpoint", "nowhere"]
    assert command.main([*words, f"--out={tmp_path / out}"]) == 2
    said = capsys.readouterr()
    assert str(tmp_path / out.partition("/")[0]) in said.err
    assert "checkpoint" not in said.err
    assert not said.out


def test_an_environment_of_before_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    whole = finish("suite", {"environment": {"load_before": 0.5}}, [], None)
    assert whole["environment"]["load_before"] == 0.5
    assert "load_after" in whole["environment"]
    assert "bundle" not in whole


def test_a_result_that_cannot_be_written_is_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        finish("suite", {"a": 1}, [], tmp_path / "file/result.json")
    assert json.loads(capsys.readouterr().out)["a"] == 1
