from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.variants import Variant, classifiers, listed, variants
from dermaflux.__main__ import _parser
from dermaflux.bundle import Bundle


def test_all_that_runs_is_listed_and_opened_by_name(tiny_bundle: Bundle) -> None:
    found = listed(tiny_bundle)
    names = [one.name for one in found]
    assert names == [
        f"{engine} {precision}"
        for engine in ("onnxruntime-cpu", "openvino-cpu")
        for precision in ("fp32", "int8")
    ]
    opened = variants(tiny_bundle, None, threads=1)
    assert list(opened) == names
    for name, pipeline in opened.items():
        engine = pipeline.engines["transformer"]
        assert name == f"{engine.name} {engine.precision}"
    assert [f"{one.engine} {one.precision}" for one in classifiers(tiny_bundle)] == names


def test_what_a_bundle_does_not_allow_is_left_out_with_its_reason(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dermaflux.engines.installed", lambda engine: engine != "openvino-cpu")
    assert [one.name for one in listed(tiny_bundle)] == [
        "onnxruntime-cpu fp32", "onnxruntime-cpu int8"
    ]  # fmt: skip
    assert "left out transformer on openvino-cpu in fp32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variant", [Variant("openvino-cpu", "int8"), Variant("eager"), Variant("onnxruntime-cpu")]
)
def test_a_variant_is_asked_for_by_options_that_the_command_knows(
    tiny_bundle: Bundle, variant: Variant
) -> None:
    words = variant.words(tiny_bundle, Path("models/mini"), 2)
    options: argparse.Namespace = _parser().parse_args(["generate", "--out", "x.png", *words])
    assert options.engine == variant.engine
    assert options.precision == variant.precision
    assert options.threads == 2
    assert options.bundle == tiny_bundle.path
    assert (options.checkpoint is not None) == (variant.engine == "eager")


def test_tiers_come_last_and_have_names_of_their_own(tiny_bundle: Bundle) -> None:
    found = listed(tiny_bundle, tiers=("int8", "cached"))
    assert [one.name for one in found[-2:]] == ["tier int8", "tier cached"]
    assert found[-1].words(tiny_bundle, None, None)[-2:] == ["--tier", "cached"]
