from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.batch import BARE, Round, main, report
from dermaflux.bundle import Bundle


def test_ratios_are_within_rounds() -> None:
    rounds = [
        Round({BARE: 10, "batch": 9.8, "batch, gate": 8}),
        Round({BARE: 5, "batch": 4.8, "batch, gate": 4.5}),
        Round({BARE: 1, "batch": 0.97, "batch, gate": 0.7}),
    ]
    found = report(rounds)
    assert found["median_ratio_to_bare"] == {"batch": 0.97, "batch, gate": 0.8}
    assert found["median_pictures_per_second"][BARE] == 5


def test_both_sides_run(tiny_bundle: Bundle, tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    status = main(["--bundle", str(tiny_bundle.path), "--pictures=4", "--rounds=1", "--batch=2",
                   "--threads=1", f"--out={out}"])  # fmt: skip
    assert status == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == found
    (rates,) = found["rounds"]
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("option", ["--pictures=0", "--rounds=-1", "--batch=0"])
def test_counts_out_of_range_are_refused(option: str, capsys) -> None:
    assert main([option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_bundle_that_is_not_there_is_told(tmp_path: Path, capsys) -> None:
    assert main(["--bundle", str(tmp_path), "--pictures=1", "--rounds=1"]) == 2
    assert "bundle.json" in capsys.readouterr().err
