from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.results_file import finish
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
