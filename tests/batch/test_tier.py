"""A tier of a batch job: pictures with steps that were forecast are another engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dermaflux.bundle import Bundle
from serving.batch.__main__ import main
from serving.batch.maker import Maker, Tools
from tests.batch.test_batch import line, write


def test_what_forecasts_has_another_hash_and_other_tiers_have_none(tiny_bundle: Bundle) -> None:
    def maker(tier: str | None) -> Maker:
        return Maker.open(Tools(tiny_bundle.path, precision="fp32", threads=1, tier=tier))

    plain, exact, cached = (maker(tier) for tier in (None, "lossless", "cached"))
    assert plain.engine == exact.engine != cached.engine
    assert cached.details["forecast"]["most_error"] > 0
    assert "forecast" not in plain.details


def test_a_job_draws_in_a_tier_and_its_pictures_say_so(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "r.jsonl", [line(0, steps=16)])
    out = tmp_path / "out"
    common = [str(rows), "--bundle", str(tiny_bundle.path), "--gate", "off", "--threads", "1"]
    assert main([*common, "--out", str(out), "--tier", "cached"]) == 0
    (picture,) = out.rglob("*.png")
    with Image.open(picture) as image:
        assert image.info["dermaflux.tier"] == "cached"
    assert main([*common, "--out", str(tmp_path / "other"), "--tier", "fast"]) == 2
    assert "tier 'fast' is not known" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
