"""Readiness: nothing is drawn or classified before every engine has run and was found right."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.engines import Array, Arrays, fake
from dermaflux.errors import BundleError, EngineError
from dermaflux.pipeline import Pipeline
from serving.app import SECURITY_HEADERS
from serving.card import GoldenCard
from serving.readiness import Readiness, prove
from serving.replies import Refusal
from serving.starting import starting
from tests.core.test_doctor import with_golden
from tests.serving.live import Live, picture, running, until
from tests.serving.test_generate import error
from tests.tiny_bundle import write_bundle

ENGINE = "onnxruntime-cpu"
PASSED = GoldenCard(result="passed", psnr_db=99.0, tolerance_db=30.0, words="as exported.")


def refusals(live: Live) -> list[tuple[int, str, str]]:
    """What the probe and all routes that compute say."""
    replies = [
        live.client.get("/readyz"),
        live.client.post("/v1/generate", json={"lesion": {"label": "benign"}}),
        live.client.post("/v1/generate/stream", json={"lesion": {"label": "benign"}}),
        live.client.post("/v1/classify", content=picture(0), headers={"content-type": "image/png"}),
        live.client.post("/v1/classify/batch", files={"image": ("a.png", picture(0))}),
    ]
    told = [error(reply) for reply in replies]
    return [
        (reply.status_code, body["code"], body["message"])
        for reply, body in zip(replies, told, strict=True)
    ]


def test_requests_are_refused_until_the_engines_are_proved() -> None:
    proved = threading.Event()

    def wait() -> GoldenCard:
        assert proved.wait(30)
        return PASSED

    with running(prove=wait) as live:
        try:
            words = "The engines are being loaded and proved."
            assert refusals(live) == [(503, "not_ready", words)] * 5
            assert int(live.client.get("/readyz").headers["retry-after"]) >= 1
            assert live.brake.steps == 0
            # Who asks why gets an answer meanwhile.
            assert live.client.get("/").status_code == 200
            assert live.client.get("/v1/model").json()["golden"]["result"] == "pending"
        finally:
            proved.set()
        until(lambda: live.client.get("/readyz").status_code == 200)
        assert live.client.get("/readyz").json() == {"ready": True}
        assert live.client.head("/readyz").status_code == 200
        assert (
            live.client.post("/v1/generate", json={"lesion": {"label": "benign"}}).status_code
            == 200
        )
        golden = live.client.get("/v1/model").json()["golden"]
        assert golden == {
            "result": "passed", "psnr_db": 99.0, "tolerance_db": 30.0, "words": "as exported."
        }  # fmt: skip


def wrong() -> GoldenCard:
    return GoldenCard(result="failed", psnr_db=9.0, tolerance_db=30.0, words="came out wrong.")


def unusable() -> GoldenCard:
    raise EngineError("the driver is gone")


def broken() -> GoldenCard:
    raise RuntimeError("secret of the house")


@pytest.mark.parametrize(
    ("prove", "words"),
    [
        (wrong, "came out wrong."),
        (unusable, "The engines cannot be used: the driver is gone."),
        (broken, "The engines failed when they were first run; the log of the service has it."),
    ],
)
def test_engines_that_are_wrong_stay_refused_and_say_why(
    caplog: pytest.LogCaptureFixture, prove: Callable[[], GoldenCard], words: str
) -> None:
    with caplog.at_level(logging.INFO, "serving"), running(prove=prove) as live:
        until(lambda: "NOT READY" in caplog.text)
        assert refusals(live) == [(503, "not_ready", words)] * 5
        # Coming back does not help.
        assert "retry-after" not in live.client.get("/readyz").headers
        golden = live.client.get("/v1/model").json()["golden"]
        assert (golden["result"], golden["words"].rstrip(".")) == ("failed", words.rstrip("."))
        assert ("secret" in caplog.text) == (prove is broken)


@pytest.mark.parametrize("result", ["skipped", "absent"])
def test_what_was_not_compared_serves_with_a_warning(
    caplog: pytest.LogCaptureFixture, result: str
) -> None:
    told = GoldenCard(result=result, words="Warning: not compared.")  # type: ignore[arg-type]
    with running(prove=lambda: told) as live:
        until(lambda: live.client.get("/readyz").status_code == 200)
        assert live.client.get("/v1/model").json()["golden"]["words"] == told.words
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert any("not compared" in message for message in warned)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/readyz"),
        ("POST", "/v1/generate"),
        ("PUT", "/a/b"),
        ("GET", "/%00"),
        ("BREW", "/"),
    ],
)
def test_before_there_is_an_app_every_address_says_why(method: str, path: str) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(starting(Readiness()))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path)

    reply = asyncio.run(ask())
    told = error(reply)
    assert (reply.status_code, told["code"]) == (503, "not_ready")
    assert "being loaded" in told["message"]
    assert int(reply.headers["retry-after"]) >= 1
    assert {name: reply.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_a_process_that_leaves_takes_nothing_more_and_says_so() -> None:
    readiness = Readiness()
    readiness.ready = True
    readiness.require()
    readiness.leave()
    with pytest.raises(Refusal, match="about to end") as found:
        readiness.require()
    assert (found.value.status, "Retry-After" in found.value.headers) == (503, True)


@pytest.fixture
def right(tmp_path: Path) -> Bundle:
    """A bundle of one's own that draws its golden image."""
    return with_golden(write_bundle(tmp_path / "bundle"))


def opened(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle, engine=ENGINE, precision="fp32", threads=1)


def test_proof_compares_the_golden_image(right: Bundle) -> None:
    found = prove(right, opened(right), compare=True)
    assert (found.result, found.psnr_db, found.tolerance_db) == ("passed", 99.0, 30.0)


def test_another_image_is_found_out_with_figures_and_the_next_step(right: Bundle) -> None:
    Image.new("RGB", (64, 64), "white").save(right.file("golden.png"))
    found = prove(right, opened(right), compare=True)
    assert found.result == "failed"
    assert found.psnr_db is not None
    assert found.psnr_db < 30
    assert f"{found.psnr_db} dB PSNR, needed are at least 30 dB" in found.words
    assert "python -m dermaflux doctor" in found.words
    assert prove(right, opened(right), compare=False).result == "skipped"


def test_without_a_comparison_engines_run_all_the_same(right: Bundle) -> None:
    pipeline = opened(right)
    ran = []

    def velocity(inputs: Arrays) -> dict[str, Array]:
        ran.append(len(inputs["timestep"]))
        return {"out_hidden_states": inputs["hidden_states"]}

    pipeline.engines = {**pipeline.engines, "transformer": fake.Fake(velocity)}
    assert prove(replace(right, golden=None), pipeline, compare=True).result == "absent"
    assert prove(right, pipeline, compare=False).result == "skipped"
    assert ran == [1, 1]


def test_golden_image_that_cannot_be_asked_for_is_the_bundles_fault(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="cannot be made again"):
        prove(tiny_bundle, opened(tiny_bundle), compare=True)
