from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ladder_generation, suite
from benchmarks.floors import Limits
from benchmarks.ladder import Effort, Ladder, Made, Rung, climb, table
from benchmarks.ladder_classification import photographs, same_answers, work_of
from benchmarks.ladder_evidence import counted, evidence_of
from benchmarks.ladder_generation import alike
from benchmarks.rates import Rate
from benchmarks.rivals import flux_optimum
from benchmarks.suite_goals import goals_of
from dermaflux.bundle import Bundle
from dermaflux.engines import OPENVINO
from dermaflux.errors import DermaFluxError, EngineError
from dermaflux.pipeline import Pipeline

GREY = np.full((1, 8, 8, 3), 100, np.uint8)
LIMITS = Limits({"fp32": Rate(1e11, "told"), "int8": Rate(3e11, "told")}, 1e10, 30_000_000)


def rung(name: str, seconds: float, output: Any = GREY, **more: Any) -> Rung:
    """One whose own clock says `seconds`, three times as many in round 1."""
    return Rung(
        name, "", lambda number: Made(output, {"denoise": seconds / 2},
                                      seconds * (3 if number == 1 else 1)), **more
    )  # fmt: skip


def no_floor(_: Rung) -> Mapping[str, Any] | None:
    return None


def test_ratios_are_within_rounds_and_of_one_image() -> None:
    rungs = [rung("base", 1.0), rung("half", 0.5, ours=True), rung("four", 1.0, images=4)]
    rows = climb(rungs, Effort(5, 60), no_floor, alike)
    assert [row["times_baseline"]["median"] for row in rows] == [1, 2, 4]
    assert rows[1]["times_baseline"] == {"median": 2, "low": 2, "high": 2}, (
        "a slow round is no gain"
    )
    assert rows[2]["before"] == "half"
    assert rows[2]["times_before"]["median"] == 2
    assert rows[2]["p50_ms"] == 250
    assert rows[2]["stages_ms"] == {"denoise": 125}
    assert "base" in table(rows)


def test_a_row_names_the_one_that_it_adds_to_and_what_made_the_same() -> None:
    other = GREY + 50
    rungs = [
        rung("base", 1.0),
        rung("two", 0.5, np.concatenate([GREY, other]), reference="two"),
        rung("ours two", 0.25, np.concatenate([GREY, other]), before="base", reference="two"),
        rung("gone", 0.5, before="was left out"),
    ]
    rows = climb(rungs, Effort(3, 60), no_floor, alike)
    assert rows[2]["times_before"]["median"] == 4
    assert rows[2]["alike"]["psnr_db"] == 99
    assert rows[3]["before"] == "ours two"
    assert not any(row["wrong"] for row in rows)


def test_another_picture_is_wrong_unless_it_is_labelled() -> None:
    rungs = [rung("base", 1), rung("wrong", 1, GREY + 60), rung("lossy", 1, GREY + 60, lossy=True),
             rung("shape", 1, GREY[:, :4])]  # fmt: skip
    rows = climb(rungs, Effort(3, 60), no_floor, alike)
    assert [row["wrong"] for row in rows] == [False, True, False, True]
    assert "WRONG" in table(rows)


def test_floors_are_of_one_image_of_a_row() -> None:
    rows = climb(
        [rung("base", 1.0), rung("four", 1.0, images=4)],
        Effort(3, 60), lambda one: {"ms": 100.0 * one.images, "precision": one.precision}, alike,
    )  # fmt: skip
    assert [row["floor"]["ms"] for row in rows] == [100, 100]
    assert [row["floor_reached"] for row in rows] == [0.1, 0.4]


@pytest.mark.parametrize(("seconds", "rounds"), [(1000, 30), (10, 10), (0.1, 3)])
def test_rounds_are_as_many_as_fit(seconds: float, rounds: int) -> None:
    assert Effort(30, seconds).fits(1.0) == rounds


def test_two_rungs_of_one_name_are_refused() -> None:
    with pytest.raises(DermaFluxError, match="different names"):
        climb([rung("a", 1), rung("a", 1)], Effort(3, 1), no_floor, alike)
    with pytest.raises(DermaFluxError, match="different names"):
        climb([], Effort(3, 1), no_floor, alike)


def test_who_fails_at_its_first_call_is_left_out_and_the_others_are_measured() -> None:
    def fails(number: int) -> Made:
        raise EngineError("out of memory")

    ladder = Ladder(
        [rung("base", 1), Rung("theirs", "", fails), rung("ours", 0.5, ours=True)], no_floor
    )
    ladder.try_out()
    assert ladder.left_out == {"theirs": "it failed: out of memory"}
    rows = climb(ladder.rungs, Effort(3, 60), ladder.floor, alike)
    assert [row["name"] for row in rows] == ["base", "ours"]


def test_evidence_is_read_from_the_engines(tiny_bundle: Bundle) -> None:
    pipeline = Pipeline.open(tiny_bundle, engine=OPENVINO, threads=1)
    counters = counted(pipeline)
    pipeline.generate([pipeline.request("nevus", seed, steps=3) for seed in (1, 2)])
    found = evidence_of(counters)
    assert found["transformer"]["calls"] == 3
    assert found["transformer"]["items"] == 6
    assert found["vae_decoder"]["items"] == 2
    assert found["transformer"]["engine"] == OPENVINO
    computed = found["vae_decoder"]["computes"]
    assert sum(sum(types.values()) for types in computed.values()) >= 1
    assert counted(pipeline) == counters, "counted once"


def test_answers_that_moved_are_wrong() -> None:
    logits = np.array([[0.0, 1.0]], np.float32)
    assert same_answers(logits, logits) == {"probability": 0, "wrong": 0}
    assert same_answers(logits, logits + 3)["probability"] == pytest.approx(0, abs=1e-6)
    assert same_answers(logits, -logits)["wrong"] == 1


def test_photographs_are_prepared_for_the_classifier(tiny_bundle: Bundle) -> None:
    assert tiny_bundle.classifier is not None
    pixels = photographs(tiny_bundle.classifier, 2)
    assert pixels.shape == (2, 3, 32, 32)
    assert not np.array_equal(pixels[0], pixels[1])


def test_attention_is_counted_on_the_cpu() -> None:
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    work = work_of(timm.create_model("vit_tiny_patch16_224", **options).eval(), (3, 32, 32))
    # 17 tokens of 32: both products of attention, 2 a multiply-add.
    assert work.attention == 2 * 2 * 17 * 17 * 32
    assert work.linear > 2 * 17 * 12 * 32 * 32


def row(name: str, times: float, **more: Any) -> dict[str, Any]:
    ratio = {"median": times, "low": times, "high": times}
    return {"name": name, "times_baseline": ratio, "ours": True, "lossy": False, "wrong": False,
            "alike": {"psnr_db": 50.0}, **more}  # fmt: skip


def test_goals_that_were_missed_are_told() -> None:
    sections = {
        "generation": {
            "rows": [
                row("theirs", 9, ours=False),
                row("far off", 5, alike={"psnr_db": 41.9}),
                row("int8", 2.9),
                row("cached", 4, lossy=True),
            ]
        },
        "classification": {"architecture": "vit_tiny_patch16_224", "rows": [row("int8", 9)]},
        "classification_other": {
            "architecture": "vit_base_patch16_224",
            "rows": [row("openvino fp32", 9, alike={}), row("openvino int8", 4, alike={})],
        },
    }
    plain, lossy, int8, pruned = goals_of(sections)
    assert (plain["value"], plain["met"], plain["row"]) == (2.9, False, "int8")
    assert (lossy["value"], lossy["met"]) == (4, True)
    assert (int8["value"], int8["met"]) == (4, True)
    assert (pruned["value"], pruned["met"]) == (None, False)


def test_the_command_keeps_what_it_has(
    tiny_bundle: Bundle, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new/suite.json"
    seen: list[Any] = []

    @contextmanager
    def opened(rungs: list[Rung]) -> Iterator[Ladder]:
        seen.append(json.loads(out.read_text()) if out.exists() else None)
        yield Ladder(rungs, no_floor, {"another": "not here"})

    def planned(rungs: list[Rung]) -> None:
        sections = {
            name: suite.Section(opened(rungs), alike, 1, {}) for name in ("generation", "batches")
        }
        monkeypatch.setattr(suite, "plan", lambda *_: sections)

    monkeypatch.setattr(suite, "same_model", lambda *_: None)
    monkeypatch.setattr(suite.Limits, "measured", lambda: LIMITS)
    words = ["--bundle", str(tiny_bundle.path), "--rounds=3", f"--out={out}"]
    planned([rung("base", 1), rung("ours", 0.5, ours=True)])
    assert suite.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["sections"]["batches"]["rows"][1]["times_baseline"]["median"] == 2
    assert result["sections"]["batches"]["left_out"] == {"another": "not here"}
    assert result["task"]["max_sequence_length"] == 16
    assert "unfinished" not in result
    assert seen[0] is None
    assert seen[1]["unfinished"], "a run that is stopped is known by it"
    assert list(seen[1]["sections"]) == ["generation"]
    assert [goal["met"] for goal in result["goals"]] == [False]
    planned([rung("base", 1), rung("ours", 0.5, ours=True)])
    assert suite.main([*words, "--fail-on-goals"]) == 1
    planned([rung("base", 1), rung("ours", 0.1, GREY + 60, ours=True)])
    assert suite.main(words) == 1
    assert "something else" in capsys.readouterr().err


def test_the_real_ladders_climb(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.Limits, "measured", lambda: LIMITS)
    monkeypatch.setattr(flux_optimum, "ENVIRONMENT", tmp_path / "none")
    status = suite.main(
        ["--quick", "--bundle", str(bundle), "--checkpoint", str(checkpoint), "--rounds=1",
         "--steps=1", "--threads=1"]
    )  # fmt: skip
    assert status == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in found["sections"]["generation"]["rows"]}
    assert found["sections"]["generation"]["rows"][0]["name"] == ladder_generation.EAGER
    assert rows["onnxruntime fp32"]["alike"]["psnr_db"] > 60
    assert rows["openvino int8"]["evidence"]["transformer"]["precision"] == "int8"
    known = rows["openvino int8, text known"]["evidence"]
    assert known["text_encoder"]["calls"] == 0 < known["transformer"]["calls"]
    assert "compiled" in " ".join(found["sections"]["generation"]["left_out"])
    judged = found["sections"]["classification"]["rows"]
    assert {"timm eager fp32", "plain onnxruntime fp32", "openvino int8"} <= {
        one["name"] for one in judged
    }
    batches = found["sections"]["batches"]["rows"]
    assert [one["images"] for one in batches] == [1, 4, 1, 4]
    everything = [one for section in found["sections"].values() for one in section["rows"]]
    assert all(one["floor_reached"] > 0 for one in everything)


def test_the_torch_row_runs_our_forward(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    options = ladder_generation.Options(threads=1)
    rows = ladder_generation._ours(tiny_bundle, tiny_checkpoint, options)
    (opened,) = (row[2] for row in rows if row[0] == "torch engine fp32")
    assert "made" in evidence_of(counted(opened()))["transformer"]
    plain = counted(Pipeline.from_checkpoint(tiny_checkpoint, threads=1))
    assert "made" not in evidence_of(plain)["transformer"], "diffusers' own forward"


def test_sections_that_cannot_be_had_are_told(
    tiny_bundle: Bundle, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "same_model", lambda *_: None)
    monkeypatch.setattr(suite.Limits, "measured", lambda: LIMITS)
    words = ["--bundle", str(tiny_bundle.path), "--sections=classification_other"]
    assert suite.main(words) == 2
    assert "--classifier-bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sections=none"], "none"),
        (["--rounds=0"], "--rounds"),
        (["--bundle", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], said: str, capsys) -> None:
    assert suite.main(words) == 2
    assert said in capsys.readouterr().err


def test_a_classifiers_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DermaFluxError, match="--classifier-checkpoint"):
        suite.architecture(tmp_path)
