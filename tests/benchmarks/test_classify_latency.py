from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import classify_latency, rates
from benchmarks.classify_latency import STAGES, Settings
from benchmarks.variants import classifiers
from dermaflux.bundle import Bundle
from dermaflux.errors import DermaFluxError


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SIDES", (64,))
    monkeypatch.setattr(rates, "_LEAST", 2**22)
    monkeypatch.setattr(rates, "_LONG", 0.0)
    monkeypatch.setattr(rates, "last_level_cache", lambda: 2**20)


def test_every_variant_is_measured_by_stage_and_size_of_batch(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classify.json"
    for number in range(3):
        Image.new("RGB", (60, 45), (number, 90, 80)).save(tmp_path / f"{number}.jpg")
    words = ["--bundle", str(tiny_bundle.path), "--photographs", str(tmp_path), "--rounds", "2"]
    assert classify_latency.main([*words, "--batch", "4,1", "--no-peak", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["photographs"] == 3
    assert {"onnxruntime-cpu fp32", "openvino-cpu int8"} <= set(result["variants"])
    for name, row in result["variants"].items():
        assert name == f"{row['engine']} {row['precision']}"
        assert list(row["batches"]) == ["1", "4"]
        for size, found in row["batches"].items():
            assert set(STAGES) <= set(found)
            assert found["total"]["p50_ms"] >= found["decode"]["p50_ms"] > 0
            each = found["total"]["p50_ms"] / int(size)
            assert found["ms_per_image"] == pytest.approx(each, rel=0.01)
            assert found["floor"]["floor_ms"] >= 0


def test_the_largest_memory_is_that_of_the_products_command(tiny_bundle: Bundle) -> None:
    choice = classifiers(tiny_bundle)[0]
    (file, *_) = classify_latency._files(None)
    assert 20 < classify_latency.peak_mb(tiny_bundle, choice, None, file) < 2000


@pytest.mark.parametrize("batch", [("0",), ("9",), ("-1",), ("two",), ("1", "1.5"), ()])
def test_sizes_that_the_bundle_does_not_take_are_refused(batch: tuple[str, ...]) -> None:
    with pytest.raises(DermaFluxError, match="--batch"):
        Settings(batch=batch).sizes(8)


def test_what_cannot_be_measured_is_one_sentence(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = ["--bundle", str(tiny_bundle.path)]
    for words, said in (
        (["--bundle", str(tmp_path / "none")], "no bundle"),
        ([*bundle, "--rounds", "0"], "--rounds 0"),
        ([*bundle, "--photographs", str(tmp_path)], "has no picture"),
    ):
        assert classify_latency.main(words) == 2
        assert said in capsys.readouterr().err
