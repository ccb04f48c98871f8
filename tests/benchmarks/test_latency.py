from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import latency, rates
from benchmarks.floors import Least, Limits
from benchmarks.flops import Work
from benchmarks.rates import Rate
from benchmarks.stages import STAGES, Spent, counted, draw
from benchmarks.variants import Variant
from dermaflux.bundle import Bundle
from dermaflux.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are looked at in test_rates; here they only have to be quick."""
    monkeypatch.setattr(rates, "_SIDES", (64,))
    monkeypatch.setattr(rates, "_LEAST", 2**22)
    monkeypatch.setattr(rates, "_LONG", 0.0)
    monkeypatch.setattr(rates, "last_level_cache", lambda: 2**20)


def spent(seconds: float, steps: int = 3) -> Spent:
    return Spent(dict.fromkeys(STAGES, seconds), (seconds / steps,) * steps)


def test_summary_compares_within_a_round() -> None:
    # The machine is three times slower in the last round; the ratio does not see it.
    rows = {"eager": [spent(2), spent(2), spent(6)], "fast": [spent(1), spent(1), spent(3)]}
    floors = {"fast": {"denoise": Least(0.1, 0.2), "decode": Least(0.1, 0.2)}}
    table = latency.summary(rows, floors)
    assert table["fast"]["times_eager"] == 2
    assert table["fast"]["times_eager_95"] == [2, 2]
    assert table["fast"]["total_ms"] == 1000 * len(STAGES)
    assert table["fast"]["encode_ms"] == 3000
    # Three steps are three calls.
    assert table["fast"]["floors"]["denoise"]["reached"] == pytest.approx(0.3)
    assert table["fast"]["floors"]["denoise"]["reached_as_quantized"] == pytest.approx(0.6)
    assert table["fast"]["floors"]["decode"]["reached"] == pytest.approx(0.1)
    assert table["eager"]["floors"] == {}


def test_forecast_steps_need_no_call(fake_pipeline: Pipeline) -> None:
    row = Spent(dict.fromkeys(STAGES, 1.0), (0.1,) * 10, calls=4)
    table = latency.summary({"cached": [row]}, {"cached": {"denoise": Least(0.1, 0.1)}})
    assert table["cached"]["transformer_calls"] == 4
    assert table["cached"]["floors"]["denoise"]["reached"] == pytest.approx(0.4)
    pipeline = counted(copy.copy(fake_pipeline))
    spent, _ = draw(pipeline, [pipeline.request("a lesion", 0, 5, height=32, width=32)])
    assert spent.calls == len(spent.steps) == 5


def test_a_floor_takes_the_rate_of_what_runs_and_reads_what_no_cache_holds() -> None:
    rates = {"fp32": Rate(10.0, ""), "bf16": Rate(None, "emulated"), "int8": Rate(40.0, "")}
    limits = Limits(rates, bandwidth=100.0, cache=50)
    work = Work(linear=80, attention=40)
    assert limits.least(work, 50, "fp32") == Least(12, 12)
    assert limits.least(work, 50, "bf16") == Least(12, 12)  # computed in fp32 here
    assert limits.least(work, 50, "int8") == Least(3, 2 + 4)
    assert limits.least(work, 5000, "int8") == Least(50, 50)
    assert limits.least(work, 50, "int8-pruned") == limits.least(work, 50, "int8")


def test_the_command_measures_every_variant_by_stage(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    words = ["--bundle", str(tiny_bundle.path), "--rounds", "2", "--steps", "3", "--batch", "2"]
    assert latency.main([*words, "--size", "32", "--no-peak", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["bundle"]["id"] == tiny_bundle.id
    assert (result["size"], result["steps"], result["batch"]) == ([32, 32], 3, 2)
    assert {"onnxruntime-cpu fp32", "openvino-cpu fp32", "openvino-cpu int8"} <= set(
        result["variants"]
    )
    for name, row in result["variants"].items():
        assert set(STAGES) <= set(row["percentiles"])
        assert len(row["steps_ms"]) == row["transformer_calls"] == 3
        assert 0 < row["denoise_ms"] < row["total_ms"]
        assert row["first_image_ms"] > 0
        assert row["floors"]["denoise"]["floor_ms"] > 0
        engine, precision = name.split()
        part = row["parts"]["transformer"]
        assert (part["engine"], part["precision"]) == (engine, precision)


def test_the_largest_memory_is_that_of_the_products_command(tiny_bundle: Bundle) -> None:
    asked = latency.Asked(tiny_bundle, 32, 32, 2, 2)
    # An interpreter with numpy takes more than 20 MB, and all of this less than 2 GB.
    assert 20 < latency.peak_mb(Variant("onnxruntime-cpu", "fp32"), asked, None, 1) < 2000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--batch", "99"], "--batch 99"),
        (["--size", "17"], "17"),
        (["--steps", "999"], "999"),
    ],
)
def test_options_out_of_range_are_one_sentence(
    tiny_bundle: Bundle, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--bundle", str(tiny_bundle.path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_missing_bundle_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--bundle", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_checkpoint_of_another_model_is_refused(
    tiny_bundle: Bundle, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--bundle", str(tiny_bundle.path), "--checkpoint", str(checkpoint)]
    assert latency.main(words) == 2
    assert "of another model" in capsys.readouterr().err
