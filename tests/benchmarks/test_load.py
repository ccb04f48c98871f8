"""Load: arrivals, figures, what counts as a result, and the command against a running service."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import asks, scrape
from benchmarks.answers import Answer, Window, percentiles, summary
from benchmarks.arrivals import closed, opened, poisson
from benchmarks.load import main
from benchmarks.sending import Access, events, fault
from dermaflux.errors import DermaFluxError
from dermaflux.prompt import Lesion
from tests.serving.live import picture, running


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    moments = poisson(rate=50, seconds=200, seed=3)
    assert moments == poisson(rate=50, seconds=200, seed=3)
    assert moments != poisson(rate=50, seconds=200, seed=4)
    assert moments == sorted(moments)
    assert moments[-1] < 200
    gaps = np.diff(moments)
    # Of 10,000 exponential gaps: the mean is within 4 %, and the deviation is as large as it.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.04)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.06)


def test_a_service_that_stalls_is_not_excused() -> None:
    """Requests that come during a stall have waited since they were due, not since it ended."""
    stall = 0.3

    async def crowd() -> list[Answer]:
        free = time.monotonic() + stall

        async def send(number: int, due: float, caller: int) -> Answer:
            sent = time.monotonic()
            time.sleep(max(0.0, free - time.monotonic()))  # keeps the load generator from sending
            return Answer(due, sent, time.monotonic(), 200)

        return await opened(send, [0.0, 0.1, 0.2])

    for number, one in enumerate(asyncio.run(crowd())):
        assert one.seconds >= stall - 0.1 * number - 0.01
        # What counting from the sending would have left out.
        assert number == 0 or one.sent - one.due >= stall - 0.1 * number - 0.01


def test_callers_of_a_closed_loop_wait_for_their_answer_and_after_a_refusal() -> None:
    under_way: set[int] = set()

    async def send(number: int, due: float, caller: int) -> Answer:
        assert caller not in under_way
        under_way.add(caller)
        await asyncio.sleep(0.01)
        under_way.discard(caller)
        refused = caller == 1
        return Answer(due, due, time.monotonic(), 429 if refused else 200, caller=caller,
                      retry_after=60.0 if refused else None)  # fmt: skip

    answers = asyncio.run(closed(send, callers=2, seconds=0.2))
    assert [one.caller for one in answers].count(1) == 1
    assert [one.caller for one in answers].count(0) > 3


def answer(due: float, seconds: float, status: int = 200, **more: object) -> Answer:
    return Answer(due, due, due + seconds, status, **more)  # type: ignore[arg-type]


def test_goodput_is_of_all_requests_and_warm_up_does_not_count() -> None:
    answers = [
        answer(0.5, 9.0),  # warming up; ends within the window
        answer(1.0, 0.1),
        answer(2.0, 0.4),
        answer(3.0, 0.0, 429, fault="busy", retries=2),
        answer(4.0, 1.0, 200, fault="no_image"),
        answer(5.0, 1.0, 0, fault="ServerDisconnectedError"),
        answer(10.9, 0.3),  # ends after it
    ]
    found = summary(answers, Window(1.0, 11.0), slo_ms=350)
    assert (found["requests"], found["results"], found["retries"]) == (6, 3, 2)
    assert found["statuses"] == {"200": 4, "429": 1}
    assert found["faults"] == {"ServerDisconnectedError": 1, "busy": 1, "no_image": 1}
    assert found["goodput"] == {"slo_ms": 350, "share": round(2 / 6, 4), "per_s": 0.2}
    assert found["throughput_per_s"] == 0.3
    assert found["latency_ms"]["p50"] == 300.0
    assert "callers" not in found


def test_percentiles_are_values_that_occurred() -> None:
    found = percentiles([float(value) for value in range(1, 101)])
    assert found == {"mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert percentiles([]) is None


def test_callers_are_told_apart() -> None:
    answers = [answer(1.0, 0.1, caller=0), answer(1.0, 0.9, caller=1), answer(2.0, 0, 429)]
    first, second = summary(answers, Window(0, 10), None)["callers"]
    assert (first["requests"], first["results"]) == (2, 1)
    assert second["latency_ms"]["p99"] == 900


def test_requests_are_the_same_by_number_and_in_the_vocabulary() -> None:
    drawn = asks.Generations("generate", seed=1, steps=(4, 20), size=64)
    bodies = [json.loads(drawn.ask(number).body) for number in range(30)]
    assert bodies == [json.loads(drawn.ask(number).body) for number in range(30)]
    assert {body["steps"] for body in bodies} == {4, 20}
    assert len({body["seed"] for body in bodies}) == 30
    for body in bodies:
        Lesion.from_mapping(body["lesion"])


def test_photographs_differ_in_size_and_format() -> None:
    files = asks.drawn(4, seed=0)
    opened_files = [Image.open(io.BytesIO(data)) for data, _ in files]
    assert {one.format for one in opened_files} == {"JPEG", "PNG", "WEBP"}
    assert [one.size for one in opened_files] == list(asks.SIZES[:4])
    assert all(
        Image.MIME[str(one.format)] == kind
        for one, (_, kind) in zip(opened_files, files, strict=True)
    )


def test_a_folder_without_pictures_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "note.txt").write_text("none")
    assert main(["http://127.0.0.1:9", "--work=classify", f"--images={tmp_path}"]) == 2
    assert "has no picture" in capsys.readouterr().err
    (tmp_path / "a.JPG").write_bytes(b"x")
    assert asks.read(tmp_path) == [(b"x", "image/jpeg")]


BEFORE = """# TYPE dermaflux_batch_size histogram
dermaflux_batch_size_bucket{le="1.0"} 5.0
dermaflux_batch_size_bucket{le="2.0"} 5.0
dermaflux_batch_size_bucket{le="+Inf"} 5.0
dermaflux_batch_size_count 5.0
dermaflux_batch_size_sum 5.0
# TYPE dermaflux_requests_total counter
dermaflux_requests_total{route="/",status="200"} 9.0
dermaflux_requests_total{route="/v1/model",status="200"} 1.0
# TYPE dermaflux_waiting gauge
dermaflux_waiting 3.0
# TYPE python_info gauge
python_info 1.0
"""
AFTER = """# TYPE dermaflux_batch_size histogram
dermaflux_batch_size_bucket{le="1.0"} 6.0
dermaflux_batch_size_bucket{le="2.0"} 9.0
dermaflux_batch_size_bucket{le="+Inf"} 9.0
dermaflux_batch_size_count 9.0
dermaflux_batch_size_sum 12.0
# TYPE dermaflux_requests_total counter
dermaflux_requests_total{route="/",status="200"} 4.0
dermaflux_requests_total{route="/v1/model",status="200"} 1.0
# TYPE dermaflux_waiting gauge
dermaflux_waiting 0.0
"""


def test_metrics_of_a_stretch() -> None:
    assert scrape.gained(BEFORE, AFTER) == {
        "dermaflux_batch_size": {"count": 4, "mean": 1.75, "by_size": {"1": 1, "2": 3}},
        # It fell: begun anew.
        'dermaflux_requests{route="/",status="200"}': 4,
    }
    assert scrape.gauges(BEFORE) == {"dermaflux_waiting": 3}


@pytest.mark.parametrize(
    ("kind", "status", "body", "told"),
    [
        ("generate", 200, b"\x89PNG\r\n\x1a\n...", ""),
        ("generate", 200, b"RIFF....WEBP", ""),
        ("generate", 200, b"", "no_image"),
        ("generate", 429, b'{"error": {"code": "busy"}}', "busy"),
        ("generate", 502, b"<html>", "no_json"),
        ("generate", 500, b'["x"]', "no_code"),
        ("classify", 200, b'{"decision": "benign"}', ""),
        ("classify", 200, b'{"error": {"code": "busy"}}', "no_decision"),
        ("classify", 200, b"", "no_json"),
    ],
)
def test_what_is_no_result_is_told(kind: asks.Kind, status: int, body: bytes, told: str) -> None:
    assert fault(asks.Ask(kind, b"", ""), status, body) == told


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_events_are_read_however_they_are_cut(cut: int) -> None:
    text = (
        b'event: queued\ndata: {"ahead": 1}\n\n: still here\n\n'
        b'event: image\ndata: {"png": "aGk="}\n\nevent: error\ndata: {"er\n\n'
    )

    async def read() -> list[object]:
        async def chunks():  # type: ignore[no-untyped-def]
            for start in range(0, len(text), cut):
                yield text[start : start + cut]

        return [one async for one in events(chunks())]

    assert asyncio.run(read()) == [
        ("queued", {"ahead": 1}),
        ("image", {"png": "aGk="}),
        ("error", {"error": {"code": "no_json"}}),
    ]


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# two wards\nfirst  # ward 3\n\nsecond\n")
    access = Access.read(file)
    assert [access.headers(n)["Authorization"][7:] for n in range(3)] == [
        "first",
        "second",
        "first",
    ]
    file.write_text("# none\n")
    with pytest.raises(DermaFluxError, match="has no key"):
        Access.read(file)
    assert Access.read(None).headers(0) == {}
    monkeypatch.setenv("LOAD_API_KEY", "third")
    assert Access.read(None).headers(5) == {"Authorization": "Bearer third"}


def test_the_command_against_a_service(tmp_path: Path, capsys) -> None:
    out = tmp_path / "load.json"
    (tmp_path / "a.png").write_bytes(picture(200))
    with running(waiting=1) as live:
        short = [live.url, "--seconds=0.4", "--warm-up=0.1", f"--out={out}", "--slo-ms=20000"]
        long = ["--steps=50", "--size=256", "--warm-up=0"]
        assert main([*short, "--concurrency=1,8", *long, "--fail-under=0"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result == json.loads(out.read_text())
        one, eight = result["levels"]
        assert one["statuses"] == {"200": one["results"]}
        assert one["goodput"]["share"] == 1
        # Two places: the others were refused, and nothing else went wrong.
        assert set(eight["statuses"]) == {"200", "429"}
        assert eight["faults"] == {"busy": eight["statuses"]["429"]}
        assert result["service"]["bundle"] == "0123456789abcdef"

        assert main([*short, "--work=stream", "--rate=20", "--insist"]) == 0
        (level,) = json.loads(out.read_text())["levels"]
        assert level["requests"] == level["results"] > 0
        assert level["first_step_ms"]["p50"] <= level["latency_ms"]["p50"]

        assert main([*short, "--work=classify", "--rate=30", f"--images={tmp_path}"]) == 0
        (level,) = json.loads(out.read_text())["levels"]
        assert level["requests"] == level["results"] > 0

        with live.brake.closed():
            impatient = ["--rate=20", "--timeout=0.2", "--fail-under=0.5"]
            assert main([*short, *impatient]) == 1
            (level,) = json.loads(out.read_text())["levels"]
            assert level["results"] == 0
            assert level["faults"]["TimeoutError"] > 0
        assert "goodput 0.000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--concurrency=1", "--rate=1"], "--concurrency is a closed loop"),
        (["--concurrency=0"], "--concurrency 0 is out of range"),
        (["--rate=nan"], "--rate nan is out of range"),
        (["--work=dig"], "--work dig is not known; use generate, stream, classify"),
        (["--steps=x"], "--steps x is out of range"),
        (["--seconds=0"], "--seconds 0.0 is out of range"),
        (["--fail-under=0.9"], "needs --slo-ms"),
        (["--fail-under=2", "--slo-ms=1"], "is a share"),
        ([], "http://127.0.0.1:9/v1/model does not answer"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(words: list[str], told: str, capsys) -> None:
    assert main(["http://127.0.0.1:9", *words]) == 2
    assert told in capsys.readouterr().err
