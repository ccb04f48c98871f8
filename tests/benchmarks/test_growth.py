from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import growth
from benchmarks.floors import Limits
from benchmarks.rates import Rate
from benchmarks.rivals.task import Task
from dermaflux.bundle import Bundle


def test_a_power_and_a_line_are_found_again() -> None:
    x = [1.0, 2.0, 8.0, 40.0]
    assert growth.exponent(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)
    found = growth.line(x, [20 + 3 * value for value in x])
    assert found["fixed_ms"] == pytest.approx(20, rel=1e-3)
    assert found["each_ms"] == pytest.approx(3, rel=1e-3)


def test_points_are_those_that_the_bundle_takes(tiny_bundle: Bundle) -> None:
    found = growth.places(Task.of(tiny_bundle), tiny_bundle.limits.size_multiple, 4, 2)
    assert [point.x for point in found["steps"]] == [1, 2, 5, 10, 20]
    assert [point.task.height for point in found["pixels"]] == [64, 96, 128]
    assert [point.images for point in found["batch"]] == [1, 2, 4]
    assert [point.threads for point in found["threads"]] == [1, 2]


def test_an_axis_without_a_floor_has_no_exponent_of_it() -> None:
    points = [{"x": x, "ours_ms": 2.0 * x, "theirs_ms": 5.0 * x, "floor_ms": None} for x in (1, 2)]
    found = growth.axis_of(points)
    assert found["exponents"] == {"ours_ms": 1, "theirs_ms": 1}
    assert "exponents" not in growth.axis_of(points[:1])


def test_the_command_measures_both_sides(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits({"fp32": Rate(1e11, ""), "int8": Rate(3e11, "")}, 1e10, 30_000_000)
    monkeypatch.setattr(growth.Limits, "measured", lambda: limits)
    out = tmp_path / "growth.json"
    status = growth.main(
        ["--bundle", str(bundle), "--checkpoint", str(checkpoint), "--axes=steps,threads",
         "--points=2", "--rounds=1", "--seconds=0.1", "--threads=1", f"--out={out}"]
    )  # fmt: skip
    assert status == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(out.read_text())
    steps = found["axes"]["steps"]["points"]
    assert [point["x"] for point in steps] == [1, 2]
    assert all(point["psnr_db"] > 30 and point["floor_ms"] > 0 for point in steps)
    assert steps[1]["gflop"] > steps[0]["gflop"]
    assert len(found["axes"]["threads"]["points"]) == 1


@pytest.mark.parametrize("words", [["--axes=time"], ["--points=0"], ["--bundle", "nowhere"]])
def test_bad_input_is_one_sentence(words: list[str], capsys) -> None:
    assert growth.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
