"""A tier is the operator's: what it changes in pictures is told with each of them."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from serving.settings import SettingError, Settings
from tests.serving.live import running
from tests.serving.test_generate import PROMPT, events

ASK = {"prompt": PROMPT, "seed": 5, "steps": 16}


def test_pictures_with_steps_that_were_forecast_say_so() -> None:
    with running(tier="cached") as live:
        reply = live.client.post("/v1/generate", json=ASK)
        assert reply.headers["X-DermaFlux-Tier"] == "cached"
        assert Image.open(io.BytesIO(reply.content)).info["dermaflux.tier"] == "cached"
        assert live.client.get("/v1/model").json()["tier"] == "cached"
        told = list(events(live.client.post("/v1/generate/stream", json=ASK)))
        assert [data["step"] for name, data in told if name == "progress"][-1] == 16
        assert told[-1][1]["tier"] == "cached"
        steps = {how: live.count("dermaflux_steps_total", how=how)
                 for how in ("computed", "forecast")}  # fmt: skip
        assert steps["computed"] + steps["forecast"] == 32
        assert 0 < steps["forecast"] < 32
        for stage, how in (("step", "computed"), ("forecast", "forecast")):
            assert live.count("dermaflux_stage_seconds_count", stage=stage) == steps[how]
    with running(tier="lossless") as live:
        exact = live.client.post("/v1/generate", json=ASK)
        assert "X-DermaFlux-Tier" not in exact.headers
        assert live.client.get("/v1/model").json()["tier"] == "lossless"
    with running() as live:
        assert live.client.post("/v1/generate", json=ASK).content == exact.content
        assert live.count("dermaflux_steps_total", how="computed") == 16
        assert live.count("dermaflux_steps_total", how="forecast") == 0
    assert reply.headers["X-DermaFlux-Pixels-SHA256"] != exact.headers["X-DermaFlux-Pixels-SHA256"]


def test_the_tiers_that_a_variable_may_name_are_checked() -> None:
    read = Settings.from_environment(
        {"DERMAFLUX_TIER": "cached", "DERMAFLUX_CLASSIFIER_TIER": "pruned"}
    )
    assert (read.tier, read.classifier_tier) == ("cached", "pruned")
    with pytest.raises(SettingError, match="DERMAFLUX_TIER is 'pruned'; it needs lossless or fp8"):
        Settings.from_environment({"DERMAFLUX_TIER": "pruned"})
