"""Generation over HTTP: the image and its record, refusals, queue, deadline, progress, cancel."""

from __future__ import annotations

import base64
import email
import email.policy
import io
import json
import socket
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dermaflux.bundle import Bundle
from dermaflux.errors import EngineError
from dermaflux.hardware import Machine, Memory
from dermaflux.images import read_marks
from dermaflux.memory import CPU
from dermaflux.residency import planned
from serving.pictures import prefers_multipart
from tests.serving.live import Live, running, until

PROMPT = "dermoscopic image of a benign lesion"


def events(reply: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in reply.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def error(reply: httpx.Response) -> dict[str, Any]:
    content = reply.json()
    assert list(content) == ["error"]
    assert content["error"]["request_id"] == reply.headers["x-request-id"]
    assert content["error"]["message"].endswith(".")
    assert "Traceback" not in reply.text
    return dict(content["error"])


def test_image_is_what_the_pipeline_draws(live: Live) -> None:
    reply = live.client.post("/v1/generate", json={"prompt": PROMPT, "seed": 7, "steps": 3})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "image/png"
    pixels = np.asarray(Image.open(io.BytesIO(reply.content)))
    (expected,) = live.pipeline.generate([live.pipeline.request(PROMPT, seed=7, steps=3)])
    assert np.array_equal(pixels, expected)


def test_record_repeats_the_image(live: Live) -> None:
    first = live.client.post("/v1/generate", json={"prompt": PROMPT, "width": 96, "guidance": 2})
    headers = first.headers
    again: dict[str, Any] = {
        "prompt": PROMPT,
        "width": 96,
        "seed": int(headers["x-dermaflux-seed"]),
        "steps": int(headers["x-dermaflux-steps"]),
        "guidance": float(headers["x-dermaflux-guidance"]),
    }
    assert again["seed"] < 2**53
    assert live.client.post("/v1/generate", json=again).content == first.content
    assert headers["x-dermaflux-bundle"] == "0123456789abcdef"
    assert (headers["x-dermaflux-engine"], headers["x-dermaflux-precision"]) == ("fake", "fp32")


def test_whole_numbers_may_be_written_with_a_point(live: Live) -> None:
    numbers = '"seed": 7.0, "steps": 2.0, "width": 96.0, "n": 1e0'
    ask = f'{{"prompt": "{PROMPT}", {numbers}}}'
    header = {"content-type": "application/json"}
    reply = live.client.post("/v1/generate", content=ask, headers=header)
    assert (reply.status_code, reply.headers["x-dermaflux-seed"]) == (200, "7")
    plain = {"prompt": PROMPT, "seed": 7, "steps": 2, "width": 96}
    assert live.client.post("/v1/generate", json=plain).content == reply.content


def test_drawn_seeds_differ(live: Live) -> None:
    seeds = {
        live.client.post("/v1/generate", json={"prompt": PROMPT}).headers["x-dermaflux-seed"]
        for _ in range(4)
    }
    assert len(seeds) == 4


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_prompt_of_any_language_is_in_the_file_alone(form: str) -> None:
    prompt = "Aufnahme einer Läsion, 黒色腫"
    with running(anonymous_roles=("generate", "free-text")) as live:
        reply = live.client.post("/v1/generate", json={"prompt": prompt, "format": form})
    assert reply.headers["content-type"] == f"image/{form}"
    marks = read_marks(reply.content)
    assert marks["dermaflux.prompt"] == prompt
    assert marks["dermaflux.seed"] == reply.headers["x-dermaflux-seed"]
    assert "Synthetic image" in marks["Description"]
    assert marks["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert prompt not in str(reply.headers)


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/generate/stream"])
def test_free_text_is_a_right(live: Live, path: str) -> None:
    reply = live.client.post(path, json={"prompt": "mole of Jane Doe"})
    assert reply.status_code == 403
    told = error(reply)
    assert (told["code"], told["field"]) == ("forbidden", "prompt")
    assert "role free-text" in told["message"]
    assert "field lesion" in told["message"]
    assert "Jane" not in reply.text
    assert live.brake.steps == 0


@pytest.mark.parametrize(
    ("ask", "form", "lossless"),
    [
        ({}, "PNG", True),
        ({"format": "webp"}, "WEBP", True),
        ({"format": "webp", "quality": 50}, "WEBP", False),
        ({"format": "jpeg"}, "JPEG", False),
        ({"format": "jpeg", "quality": 100}, "JPEG", False),
    ],
)
def test_formats_hold_the_same_image(
    live: Live, ask: dict[str, Any], form: str, lossless: bool
) -> None:
    reply = live.client.post("/v1/generate", json={"prompt": PROMPT, "seed": 3, **ask})
    (expected,) = live.pipeline.generate([live.pipeline.request(PROMPT, seed=3)])
    with Image.open(io.BytesIO(reply.content)) as picture:
        assert picture.format == form
        difference = np.abs(np.asarray(picture).astype(int) - expected)
    assert (difference.max() == 0) == lossless
    # The fake's images are noise, which nothing compresses well; another image is 60 off.
    assert difference.mean() < 40
    assert f".{'jpg' if form == 'JPEG' else form.lower()}" in reply.headers["content-disposition"]


def singles(live: Live, **ask: Any) -> list[bytes]:
    seed, count = ask.pop("seed"), ask.pop("n")
    return [
        live.client.post("/v1/generate", json={**ask, "seed": (seed + i) % 2**53}).content
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", [40, 2**53 - 2])
def test_several_images_are_those_of_the_next_seeds_in_a_zip(live: Live, seed: int) -> None:
    ask = {"prompt": PROMPT, "seed": seed, "n": 3, "steps": 2}
    reply = live.client.post("/v1/generate", json=ask)
    assert reply.headers["content-type"] == "application/zip"
    assert reply.headers["x-dermaflux-images"] == "3"
    assert reply.headers["x-dermaflux-seed"] == str(seed)
    with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
        assert archive.testzip() is None
        files = [archive.read(name) for name in archive.namelist()]
        assert archive.namelist()[0] == f"dermaflux-{seed}.png"
    assert files == singles(live, **ask)
    assert live.client.post("/v1/generate", json=ask).content == reply.content


def test_several_images_as_parts_each_with_its_record(live: Live) -> None:
    ask = {"prompt": PROMPT, "seed": 5, "n": 2, "format": "webp"}
    reply = live.client.post("/v1/generate", json=ask, headers={"accept": "multipart/mixed"})
    kind = reply.headers["content-type"]
    assert kind.startswith("multipart/mixed; boundary=")
    message = email.message_from_bytes(
        f"Content-Type: {kind}\r\n\r\n".encode() + reply.content, policy=email.policy.HTTP
    )
    parts = list(message.iter_parts())
    assert [part.get_content_type() for part in parts] == ["image/webp"] * 2
    assert [part["X-DermaFlux-Seed"] for part in parts] == ["5", "6"]
    assert [part.get_filename() for part in parts] == ["dermaflux-5.webp", "dermaflux-6.webp"]
    assert [part.get_payload(decode=True) for part in parts] == singles(live, **ask)


@pytest.mark.parametrize(
    ("accept", "multipart"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/zip, multipart/mixed", False),
        ("multipart/mixed", True),
        ("Multipart/Mixed;q=0.5", True),
        ("multipart/*", True),
        ("multipart/mixed, application/zip;q=0.9", True),
        ("multipart/mixed;q=0.3, */*;q=0.8", False),
        ("multipart/mixed;q=much", False),
        (";;,q=1,=", False),
    ],
)
def test_what_is_accepted_is_weighed(accept: str, multipart: bool) -> None:
    assert prefers_multipart(accept) == multipart


def test_lesion_becomes_a_caption(live: Live) -> None:
    lesion = {"diagnosis": "melanoma", "colors": ["black", "dark brown"], "size": "small"}
    reply = live.client.post("/v1/generate", json={"lesion": lesion})
    assert read_marks(reply.content)["dermaflux.prompt"] == (
        "dermoscopic image of a malignant lesion, melanoma, dark brown and black, "
        "small in the field"
    )


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, None),
        ({"prompt": PROMPT, "lesion": {"label": "benign"}}, None),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 2001}, "prompt"),
        ({"prompt": "a\u0000b"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": PROMPT, "colour": "red"}, "colour"),
        ({"prompt": PROMPT, "seed": -1}, "seed"),
        ({"prompt": PROMPT, "seed": 2**53}, "seed"),
        ({"prompt": PROMPT, "seed": 1.5}, "seed"),
        ({"prompt": PROMPT, "seed": "7"}, "seed"),
        ({"prompt": PROMPT, "seed": True}, "seed"),
        ({"prompt": PROMPT, "steps": 0}, "steps"),
        ({"prompt": PROMPT, "steps": 51}, "steps"),
        ({"prompt": PROMPT, "guidance": -0.1}, "guidance"),
        ({"prompt": PROMPT, "guidance": 31}, "guidance"),
        ({"prompt": PROMPT, "width": 40}, "width"),
        ({"prompt": PROMPT, "height": 16}, "height"),
        ({"prompt": PROMPT, "height": 4096}, "height"),
        ({"prompt": PROMPT, "n": 0}, "n"),
        ({"prompt": PROMPT, "n": 9}, "n"),
        ({"prompt": PROMPT, "n": None}, "n"),
        ({"prompt": PROMPT, "n": 2.5}, "n"),
        ({"prompt": PROMPT, "format": "gif"}, "format"),
        ({"prompt": PROMPT, "format": "PNG"}, "format"),
        ({"prompt": PROMPT, "format": "jpeg", "quality": 0}, "quality"),
        ({"prompt": PROMPT, "format": "webp", "quality": 101}, "quality"),
        ({"prompt": PROMPT, "quality": 90}, None),
        ({"prompt": PROMPT, "previews": -1}, "previews"),
        ({"prompt": PROMPT, "previews": 9}, "previews"),
        ({"lesion": {}}, "lesion.label"),
        ({"lesion": {"label": "bening"}}, "lesion.label"),
        ({"lesion": {"label": "benign", "diagnosis": "melanoma"}}, "lesion.diagnosis"),
        ({"lesion": {"label": "benign", "shape": "round"}}, "lesion.shape"),
        ({"lesion": {"label": "benign", "colors": "black"}}, "lesion.colors"),
        ({"lesion": {"label": "benign", "colors": ["black", "black"]}}, "lesion.colors"),
        ({"lesion": "melanoma"}, "lesion"),
        ([], None),
        ("benign", None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/generate/stream"])
def test_wrong_fields_are_named(live: Live, path: str, body: object, field: str | None) -> None:
    reply = live.client.post(path, json=body)
    assert reply.status_code == 422
    told = error(reply)
    assert told["code"] == "invalid_request"
    assert told.get("field") == field
    assert live.brake.steps == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "x"} trailing',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 20_000,
        b'{"a":' * 9_000,
    ],
)
def test_what_is_not_json_is_refused(live: Live, body: bytes) -> None:
    reply = live.client.post(
        "/v1/generate", content=body, headers={"content-type": "application/json"}
    )
    assert (reply.status_code, error(reply)["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000])
@pytest.mark.parametrize("field", ["guidance", "seed", "steps", "width"])
def test_numbers_that_are_none_are_refused(live: Live, field: str, number: str) -> None:
    reply = live.client.post(
        "/v1/generate",
        content=f'{{"prompt": "x", "{field}": {number}}}',
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert reply.status_code in (400, 422)
    assert len(error(reply)["message"]) < 300


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "", "application/jsonx"])
def test_other_content_types_are_refused(live: Live, kind: str) -> None:
    reply = live.client.post(
        "/v1/generate", content=b'{"prompt": "x"}', headers={"content-type": kind}
    )
    assert (reply.status_code, error(reply)["code"]) == (415, "unsupported_media_type")


def test_long_bodies_are_refused_declared_or_chunked(live: Live) -> None:
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    header = {"content-type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    for content in (body, chunks()):
        reply = live.client.post("/v1/generate", content=content, headers=header)
        assert (reply.status_code, error(reply)["code"]) == (413, "body_too_large")


def test_slow_bodies_are_refused() -> None:
    with running(deadline_seconds=1.0) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(
                b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                b'Content-Length: 20\r\n\r\n{"prompt'
            )
            assert line.recv(1000).startswith(b"HTTP/1.1 408")


def test_queue_is_bounded_and_says_when_to_come_back() -> None:
    with running(waiting=1) as live, ThreadPoolExecutor(1) as pool, live.brake.closed():
        ask = {"prompt": PROMPT}
        first = pool.submit(live.client.post, "/v1/generate", json=ask)
        live.brake.wait_for(1)
        with live.client.stream("POST", "/v1/generate/stream", json=ask) as second:
            told = events(second)
            name, place = next(told)
            assert (name, place["ahead"]) == ("queued", 1)
            third = live.client.post("/v1/generate", json=ask)
            assert (third.status_code, error(third)["code"]) == (429, "busy")
            assert int(third.headers["retry-after"]) >= 1
            live.brake.open.set()
            assert first.result().status_code == 200
            assert [name for name, _ in told][-1] == "image"
        assert live.count("dermaflux_requests_total", route="/v1/generate", status="429") == 1


def test_deadline_stops_the_work() -> None:
    with running(deadline_seconds=1.0) as live:
        with live.brake.closed():
            reply = live.client.post("/v1/generate", json={"prompt": PROMPT, "steps": 50})
            assert (reply.status_code, error(reply)["code"]) == (504, "deadline")
        again = live.client.post("/v1/generate", json={"prompt": PROMPT})
        assert again.status_code == 200
        assert live.brake.steps <= 2 + 4
        assert live.count("dermaflux_generations_total", outcome="deadline") == 1


def test_failure_is_a_500_without_details() -> None:
    with running(fails=RuntimeError("secret of the house")) as live:
        reply = live.client.post(
            "/v1/generate", json={"prompt": PROMPT}, headers={"x-request-id": "mine-1"}
        )
        assert reply.status_code == 500
        assert error(reply) == {
            "code": "internal",
            "message": "Something failed here; the log of the service has it under this id.",
            "request_id": "mine-1",
        }


def test_stream_tells_every_step_then_the_same_image(live: Live) -> None:
    ask = {"prompt": PROMPT, "seed": 5, "steps": 6}
    with live.client.stream("POST", "/v1/generate/stream", json=ask) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        told = list(events(reply))
    assert told[0] == ("queued", {"ahead": 0, "seed": 5, "images": 1})
    steps = [data["step"] for name, data in told if name == "progress"]
    # A reader that falls behind misses steps, but never the last.
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    name, image = told[-1]
    assert name == "image"
    single = live.client.post("/v1/generate", json=ask)
    assert base64.b64decode(image.pop("file")) == single.content
    assert image == {
        "image": 0,
        "format": "png",
        "seed": 5,
        "prompt": PROMPT,
        "steps": 6,
        "guidance": 3.5,
        "width": 64,
        "height": 64,
        "bundle": "0123456789abcdef",
        "engine": "fake",
        "precision": "fp32",
        "tier": None,
        "prompt_tokens": 6,
        "text_length": 16,
    }


def test_stream_is_not_silent_for_long(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.stream.STILL_HERE_SECONDS", 0.05)
    with (
        live.brake.closed(),
        live.client.stream("POST", "/v1/generate/stream", json={"prompt": PROMPT}) as reply,
    ):
        lines = reply.iter_lines()
        assert ": still here" in (next(lines) for _ in range(20))
        live.brake.open.set()
        assert "event: image" in list(lines)


def test_stream_tells_failures_in_band() -> None:
    with (
        running(fails=EngineError("gave numbers that are not finite")) as live,
        live.client.stream("POST", "/v1/generate/stream", json={"prompt": PROMPT}) as reply,
    ):
        told = list(events(reply))
    assert [name for name, _ in told] == ["queued", "error"]
    assert told[1][1]["error"]["code"] == "internal"
    assert told[1][1]["error"]["request_id"] == reply.headers["x-request-id"]
    assert "field" not in told[1][1]["error"]


def test_image_that_does_not_fit_in_memory_is_refused_at_once(
    live: Live, tiny_bundle: Bundle
) -> None:
    machine = Machine(2, Memory(10**10, 10**10, "test"))
    _, plan = planned(tiny_bundle, "onnxruntime-cpu", machine=machine)
    enough = plan.peak(CPU, 64, 64)
    live.pipeline.plan = replace(plan, devices={CPU: Memory(10**10, enough, "test")})
    ask = {"prompt": PROMPT, "steps": 1}
    for path in ("/v1/generate", "/v1/generate/stream"):
        reply = live.client.post(path, json={**ask, "height": 256})
        assert (reply.status_code, error(reply)["field"]) == (422, "height")
        assert "64 x 256 pixels does not fit" in error(reply)["message"]
    assert live.brake.steps == 0
    assert live.client.post("/v1/generate", json=ask).status_code == 200


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/generate/stream"])
def test_client_that_leaves_stops_the_work_at_the_next_step(live: Live, path: str) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": PROMPT, "steps": 50}).encode()
    with live.brake.closed():
        with socket.create_connection((host, int(port))) as line:
            line.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            live.brake.wait_for(1)
        until(lambda: left(live))
    assert live.client.post("/v1/generate", json={"prompt": PROMPT}).status_code == 200
    assert live.brake.steps <= 2 + 4


def left(live: Live) -> bool:
    """Whether the service has noticed; the brake is still closed, so nothing else can tell."""
    return live.count("dermaflux_generations_total", outcome="cancelled") == 1


def test_other_requests_are_answered_during_a_generation(live: Live) -> None:
    with live.brake.closed(), ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(live.client.post, "/v1/generate", json={"prompt": PROMPT})
        live.brake.wait_for(1)
        assert live.client.get("/v1/model", timeout=2).status_code == 200
        live.brake.open.set()
        assert drawing.result().status_code == 200
