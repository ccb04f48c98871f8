from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency
from dermaflux.bundle import Bundle

FLUX_DEV = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "in_channels": 64,
    "joint_attention_dim": 4096,
}


def test_flops_of_flux_dev_are_the_published_ones() -> None:
    # 59.512 TFLOP of linear layers (diffusers' own count: 59.523) and 14.872 of attention.
    flops = latency.transformer_flops(FLUX_DEV, image_tokens=4096, text_tokens=512)
    assert flops / 1e12 == pytest.approx(74.385, rel=2e-3)


def test_summary_compares_within_a_round() -> None:
    def row(seconds: float) -> dict[str, float]:
        return dict.fromkeys(latency.STAGES, seconds)

    # The machine is three times slower in the last round; the ratio does not see it.
    times = {"eager": [row(2), row(2), row(6)], "fast": [row(1), row(1), row(3)]}
    table = latency.summary(times, floor=0.5)
    assert table["fast"]["times_eager"] == 2
    assert table["fast"]["total_ms"] == 1000
    assert table["fast"]["floor_reached"] == 0.5


def test_the_command_measures_every_variant(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "latency.json"
    status = latency.main(
        ["--bundle", str(bundle), "--rounds", "1", "--steps", "2", "--out", str(out)]
    )
    assert status == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["bundle"]["id"] == Bundle.open(bundle).id
    assert {"onnxruntime-cpu fp32", "openvino-cpu fp32", "openvino-cpu int8"} <= set(
        result["variants"]
    )
    assert all(row["denoise_ms"] > 0 for row in result["variants"].values())


def test_a_missing_bundle_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--bundle", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
