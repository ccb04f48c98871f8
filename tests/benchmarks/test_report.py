from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import report, report_tables
from benchmarks.report_markdown import machine_line
from tests.benchmarks.test_suite import row

MACHINE = {"processor": "Tin", "usable_cores": 2, "versions": {"torch": "1"}, "load_before": 0.1,
           "load_after": 1.9, "instructions": ["avx2"]}  # fmt: skip
COUNT = {"transformer": {"engine": "openvino-cpu", "precision": "int8", "items": 20, "calls": 20,
                         "computes": {"FullyConnected": {"i8": 44}}},
         "text_encoder": {"items": 0}, "vae_decoder": {"items": 2}}  # fmt: skip


def ladder_row(name: str, times: float, **more: Any) -> dict[str, Any]:
    return row(name, times, **{
        "technique": "of | kinds", "p50_ms": 100 / times, "p90_ms": 120 / times, "before": "first",
        "times_before": {"median": 1.5, "low": 1, "high": 2},
        "stages_ms": {"text": 1, "denoise": 9},
        "floor": {"ms": 5.0}, "floor_reached": 0.25, "evidence": COUNT,
        "alike": {"psnr_db": 52.5, "worst_psnr_db": 50.0}, **more,
    })  # fmt: skip


def suite_result(**more: Any) -> dict[str, Any]:
    rows = [ladder_row("first", 1, ours=False, evidence={"dtype": "float32"}),
            ladder_row("second", 2.5), ladder_row("third", 4, lossy=True)]  # fmt: skip
    return {
        "benchmark": "suite", "command": "python -m benchmarks.suite", "environment": MACHINE,
        "threads": 2, "task": {"size": [128, 128], "steps": 20, "max_sequence_length": 64},
        "goals": [{"goal": "fast", "needed": 3.0, "value": 2.5, "met": False, "row": "second",
                   "between": [2.4, 2.6]},
                  {"goal": "faster", "needed": 6.0, "value": None, "met": False}],
        "sections": {
            "generation": {"rows": rows, "left_out": {"bf16": "emulated"}},
            "classification": {
                "rows": [ladder_row("first", 1,
                                    alike={"probability": 0, "worst_probability": 0.01})],
                "left_out": {}, "architecture": "vit_base_patch16_224", "batch": 8,
            },
        },
        **more,
    }  # fmt: skip


GROWTH = {
    "benchmark": "growth", "environment": MACHINE, "ours": "openvino-cpu int8", "theirs": "eager",
    "axes": {
        axis: {
            "points": [
                {"x": x, "ours_ms": 10.0 * x, "theirs_ms": 30.0 * x, "floor_ms": 2.0 * x,
                 "gflop": x, "psnr_db": 50.0, "times": {"median": 3, "low": 2.9, "high": 3.1}}
                for x in (1, 2)
            ],
            "exponents": {"ours_ms": 1.0}, "lines": {"ours_ms": {"fixed_ms": 1, "each_ms": 2}},
        }
        for axis in ("steps", "pixels", "threads")
    },
}  # fmt: skip
COLD = {
    "benchmark": "cold_start", "environment": MACHINE, "first_image_s": 1.5, "goal_s": 3.0,
    "goal_met": True, "page_cache": "warm",
    "medians": {"generate": {"written_s": 1.5},
                "generate, by stage": {"import_s": 0.5, "load_s": 0.8}},
}  # fmt: skip
HTTP = {
    "benchmark": "http_classify", "environment": MACHINE, "left_out": {"litserve": "not installed"},
    "goals": [{"goal": "at 16", "at_least": 0.9, "found": None, "met": None}],
    "sides": {"ours": {"settings": "ours", "lossy": True, "images_per_s": 90.0, "open": None,
                       "closed": {"16": [{"images_per_s": 91.0, "latency_ms": {"p50": 170.0}}]}},
              "fastapi": {"settings": "2 workers", "images_per_s": 20.0}},
}  # fmt: skip
GPU = {
    "benchmark": "gpu", "gpu_figure": False, "note": "not a GPU figure",
    "left_out": {"fp8": "none"},
    "environment": {**MACHINE, "device": {"name": "cpu"}},
    "rows": {"diffusers eager": {"median_s": 5.0, "floor_s": 2.0, "percent_of_floor": 40.0},
             "rates": {"flops_bf16": 1e12}},
    "goals": [{"row": "lossless", "goal_s": 3.4, "seconds": 3.6, "met": False}],
}  # fmt: skip
QUALITY = {
    "benchmark": "quality", "environment": MACHINE, "reference": "eager", "prompts": 8, "steps": 20,
    "variants": {"tier cached": {
        "psnr_db": {"median": 51.0, "worst": 44.0}, "ssim": {"median": 0.99},
        "times_reference": {"median": 3.9}, "transformer_calls": 12,
        "fewer_steps_fp32": {"psnr_db": {"median": 38.0}, "steps": 7}}},
    "classifier": {"reference": "eager", "photographs": 585, "malignant": 110, "variants": {
        "int8": {"auc": 0.751, "auc_change": 0.0001, "auc_change_95": [-0.001, 0.0012],
                 "probability_change_most": 0.02, "labels_changed": 3}}},
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_every_kind_becomes_tables_and_small_plots(results: Path, tmp_path: Path, capsys) -> None:
    everything = {"suite": suite_result(), "growth": GROWTH, "cold": COLD, "http": HTTP, "gpu": GPU,
                  "quality": QUALITY}  # fmt: skip
    for name, content in everything.items():
        put(results, name, content)
    out = tmp_path / "docs/speed.md"
    assert report.main([str(results), "--out", str(out)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(told["read"]) == 6
    text = out.read_text()
    assert len(told["plots"]) == 7
    for name in told["plots"]:
        data = Path(name).read_bytes()
        assert f"]({Path(name).name})" in text
        assert Image.open(io.BytesIO(data)).format == "PNG"
        assert len(data) < 150_000
    assert text.count("Tin, 2 cores") == 6, "a machine's line above each"
    assert "| fast | 3 | 2.5 (2.40 to 2.60) | **missed** | second |" in text
    assert "| faster | 6 | no such row | **missed** |  |" in text
    assert "third** (lossy)" in text
    assert "10 steps and 0 texts computed a picture" in text
    assert "of \\| kinds" in text, "a bar in a cell would break the table"
    assert "Left out: bf16: emulated." in text
    assert "not a GPU figure" in text
    assert "| at 16 | 0.9 |  | not measured |" in text
    assert "| 91, 170 |" in text
    assert "+0.0001 (-0.0010 to +0.0012)" in text
    assert "tier cached: fewer steps fp32 | 38" in text


def test_machines_are_never_mixed(results: Path, tmp_path: Path) -> None:
    put(results, "a", suite_result())
    other = {**MACHINE, "processor": "Copper", "load_before": 4.0}
    put(results, "b", suite_result(environment=other))
    out = tmp_path / "speed.md"
    assert report.main([str(results), "--out", str(out), "--no-plots"]) == 0
    first, second = out.read_text().split("## Beside what users")[1:]
    assert "Tin" in first
    assert "Copper" not in first
    assert "not a quiet machine" not in first
    assert "Copper" in second
    assert "not a quiet machine" in second


def test_a_machine_is_judged_by_what_others_took_not_by_the_command_before() -> None:
    busy = {**MACHINE, "load_before": 4.0, "others_before": 0.3, "others_meanwhile": 0.02}
    line = machine_line({"environment": busy})
    assert "Of the cores, other processes took 30 % before measuring, 2 % meanwhile." in line
    assert "not a quiet machine" not in line
    assert "(**not a quiet machine**)" in machine_line(
        {"environment": {**busy, "load_before": 0.1, "others_meanwhile": 0.2}}
    )


def test_a_run_that_was_stopped_says_so(results: Path, tmp_path: Path) -> None:
    put(results, "a", suite_result(unfinished=True))
    out = tmp_path / "speed.md"
    assert report.main([str(results), "--out", str(out), "--no-plots"]) == 0
    assert "This run was stopped" in out.read_text()
    put(results, "b", {**GPU, "stopped": True})
    assert report.main([str(results), "--out", str(out), "--no-plots"]) == 0
    assert out.read_text().count("This run was stopped") == 2


def test_damaged_and_foreign_files_are_left_out_by_name(
    results: Path, tmp_path: Path, capsys
) -> None:
    put(results, "good", GROWTH)
    put(results, "soak", {"benchmark": "soak"})
    put(results, "list", [1])
    (results / "half.json").write_text('{"benchmark": ')
    (results / "folder.json").mkdir()
    damaged = {"suite": {"sections": {"generation": {"rows": [{}]}}}, "cold_start": {},
               "gpu": {"rows": []}, "latency": {"variants": [1]}, "growth": {"axes": {}},
               "quality": {"variants": None}, "http_classify": {"sides": {"a": 1}}}  # fmt: skip
    for kind, content in damaged.items():
        put(results, kind, {"benchmark": kind, **content})
    out = tmp_path / "speed.md"
    assert report.main([str(results), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    names = {*damaged, "soak", "list", "half", "folder"}
    assert set(told["left_out"]) == {f"{name}.json" for name in names}
    assert [Path(one).name for one in told["read"]] == ["good.json"]
    assert "benchmarks.cold_start" in told["left_out"]["cold_start.json"]
    assert "half.json" in captured.err


@pytest.mark.parametrize("make", [False, True])
def test_without_a_result_the_command_that_makes_one_is_named(
    results: Path, tmp_path: Path, capsys, make: bool
) -> None:
    place = results if make else tmp_path / "nowhere"
    assert report.main([str(place), "--out", str(tmp_path / "speed.md")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "speed.md").exists()


def test_results_of_before_are_still_read() -> None:
    old = {
        "benchmark": "latency", "environment": {"processor": "Tin", "cores": 2},
        "size": [128, 128], "steps": 20,
        "variants": {"eager": {"total_ms": 498.5, "times_eager": 1.0, "floor_reached": 0.3}},
    }  # fmt: skip
    assert "| eager |" in report_tables.tables("latency", old)
    assert "of the fp32 floor" in report_tables.tables("latency", old)
    floors = {"denoise": {"reached": 0.2, "reached_as_quantized": 0.4}}
    new = {**old, "variants": {"int8": {"total_ms": 100.0, "floor_reached": 1.3, "floors": floors}}}
    assert "of its floor" in report_tables.tables("latency", new)
    assert "| 40 % |" in report_tables.tables("latency", new), "not more than can be"
    assert machine_line(old) == "Tin, 2 cores."
