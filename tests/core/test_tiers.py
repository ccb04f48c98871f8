"""Tiers: each runs what it allows, and what contradicts it is refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dermaflux.bundle import Bundle
from dermaflux.engines import EAGER, OPENVINO, ORT, choose
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine
from dermaflux.pipeline import Pipeline
from dermaflux.tiers import CLASSIFIER_TIERS, TIERS, classifier_tier, tier
from tests.tiny_bundle import write_bundle

CPU = Machine(cores=2, ram=None, no_gpu="none")


def test_an_unknown_tier_is_refused_with_those_there_are() -> None:
    with pytest.raises(EngineError, match="'fast' is not known; use lossless, fp8, int8, cached"):
        tier("fast")
    with pytest.raises(EngineError, match="'cached' is not known; use lossless, int8, fp8, pruned"):
        classifier_tier("cached")
    assert [tier(name).name for name in TIERS] == list(TIERS)
    assert [classifier_tier(name).name for name in CLASSIFIER_TIERS] == list(CLASSIFIER_TIERS)


def test_each_tier_runs_what_it_allows_on_a_cpu(tiny_bundle: Bundle) -> None:
    def runs(name: str, part: str = "transformer") -> tuple[str, str, str]:
        choice = choose(tiny_bundle, part, machine=CPU, tier=tier(name))
        return choice.engine, choice.precision, choice.reason

    fastest = choose(tiny_bundle, "transformer", machine=CPU)
    assert runs("lossless")[:2] == (OPENVINO, "fp32")
    assert runs("int8")[:2] == (OPENVINO, "int8")
    assert runs("cached")[:2] == (fastest.engine, fastest.precision)
    assert runs("int8")[2].startswith("tier int8: ")
    # Parts without a file of it keep their order of speed.
    assert runs("int8", "vae_decoder")[1] == "fp32"
    assert "tier" not in runs("int8", "vae_decoder")[2]
    judged = choose(tiny_bundle, "classifier", machine=CPU, tier=classifier_tier("lossless"))
    assert judged.precision == "fp32"


def test_a_part_that_takes_the_time_needs_a_file_of_the_tier(tiny_bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"tier 'fp8' needs transformer in fp8, .* has fp32, int8"
    ):
        choose(tiny_bundle, "transformer", machine=CPU, tier=tier("fp8"))
    with pytest.raises(EngineError, match="needs classifier in int8-pruned"):
        choose(tiny_bundle, "classifier", machine=CPU, tier=classifier_tier("pruned"))


def test_a_pruned_file_runs_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    files = manifest["parts"]["classifier"]["files"]
    files["int8-pruned"] = files.pop("int8")
    (folder / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(folder)
    assert choose(bundle, "classifier", machine=CPU).precision == "fp32"
    pruned = choose(bundle, "classifier", machine=CPU, tier=classifier_tier("pruned"))
    assert pruned.precision == "int8-pruned"
    asked = choose(bundle, "classifier", precision="int8-pruned", machine=CPU)
    assert (asked.engine, asked.precision) == (pruned.engine, "int8-pruned")


def test_a_precision_narrows_a_tier_or_contradicts_it(tiny_bundle: Bundle) -> None:
    taken = choose(tiny_bundle, "transformer", None, "fp32", CPU, tier=tier("lossless"))
    assert taken.precision == "fp32"
    with pytest.raises(EngineError, match="'int8' contradicts tier 'lossless', which runs bf16 or"):
        choose(tiny_bundle, "transformer", None, "int8", CPU, tier=tier("lossless"))
    for level in ("fp32", "int8"):
        taken = choose(tiny_bundle, "transformer", ORT, level, CPU, tier=tier("cached"))
        assert (taken.engine, taken.precision) == (ORT, level)


def test_torch_runs_a_tier_in_the_precision_of_its_device(tiny_bundle: Bundle) -> None:
    def level(name: str, device: str, precision: str | None = None) -> str:
        return tier(name).of_torch(device, precision)

    assert [level(name, "cpu") for name in ("lossless", "fp8", "cached")] == ["fp32", "fp8", "fp32"]
    assert [level(n, "cuda:1") for n in ("lossless", "fp8", "cached")] == ["bf16", "fp8", "bf16"]
    assert level("cached", "cuda", "fp8") == "fp8"
    with pytest.raises(EngineError, match="no int8, which tier 'int8' needs"):
        level("int8", "cpu")
    with pytest.raises(EngineError, match="'fp32' contradicts tier 'fp8'"):
        level("fp8", "cpu", "fp32")
    assert choose(tiny_bundle, "transformer", EAGER, tier=tier("fp8")).precision == "fp8"


def test_a_pipeline_of_a_checkpoint_takes_tiers(tiny_checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="the eager engine has no int8"):
        Pipeline.from_checkpoint(tiny_checkpoint, tier="int8")
    plain = Pipeline.from_checkpoint(tiny_checkpoint)
    exact = Pipeline.from_checkpoint(tiny_checkpoint, tier="lossless")
    near = Pipeline.from_checkpoint(tiny_checkpoint, tier="cached")
    request = plain.request("benign lesion", seed=1, steps=12)
    assert plain.record(request) == exact.record(request)
    assert near.record(request) == {**plain.record(request), "tier": "cached"}
    whole, same, _ = (one.latents([request])[0] for one in (plain, exact, near))
    assert np.allclose(whole, same, atol=1e-3)
