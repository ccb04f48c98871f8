"""What all routes share: headers, errors, document, card, the page's files, settings."""

from __future__ import annotations

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from dermaflux.bundle import GENERATOR_PARTS
from dermaflux.prompt import VOCABULARY
from serving import body
from serving.app import SECURITY_HEADERS, STATIC, SYSTEM_PATHS, paths
from serving.door import Door
from serving.replies import Refusal
from serving.settings import SettingError, Settings
from tests.serving.live import Live, running
from tests.serving.test_generate import error

PNG = {"content-type": "image/png"}


@pytest.mark.parametrize("path", ["/", "/v1/model", "/openapi.json", "/static/main.js", "/nothing"])
def test_security_headers_are_on_every_reply(live: Live, path: str) -> None:
    headers = live.client.get(path).headers
    assert {name: headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/v1",
        "/v1/generate/",
        "/static/",
        "/static/../app.py",
        "/%00",
        "/static/%00",
        "/static/" + "a" * 3000,
    ],
)
def test_unknown_paths_are_told_in_our_form(live: Live, path: str) -> None:
    reply = live.client.get(path)
    assert (reply.status_code, error(reply)["code"]) == (404, "not_found")
    assert live.count("dermaflux_requests_total", route="other", status="404") == 1


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/generate", "POST"),
        ("PUT", "/v1/classify", "POST"),
        ("DELETE", "/v1/model", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("POST", "/static/main.js", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
    ],
)
def test_wrong_methods_name_the_right_one(live: Live, method: str, path: str, allowed: str) -> None:
    reply = live.client.request(method, path)
    assert (reply.status_code, error(reply)["code"]) == (405, "method_not_allowed")
    assert sorted(reply.headers["allow"].split(", ")) == sorted(allowed.split(", "))


def test_open_requests_are_bounded() -> None:
    with running(open_requests=1) as live, ThreadPoolExecutor(1) as pool, live.brake.closed():
        drawing = pool.submit(
            live.client.post, "/v1/generate", json={"lesion": {"label": "benign"}}
        )
        live.brake.wait_for(1)
        reply = live.client.post("/v1/generate", json={"lesion": {"label": "benign"}})
        assert (reply.status_code, error(reply)["code"]) == (429, "busy")
        assert reply.headers["retry-after"] == "1"
        # What takes no memory answers all the same.
        assert live.client.get("/v1/model").status_code == 200
        assert live.client.get("/").status_code == 200
        live.brake.open.set()
        assert drawing.result().status_code == 200
        assert (
            live.client.post("/v1/generate", json={"lesion": {"label": "benign"}}).status_code
            == 200
        )


def stalled(live: Live, length: int = 100, sent: bytes = b"{") -> socket.socket:
    """A request whose body does not come whole."""
    url = httpx.URL(live.url)
    way = socket.create_connection((url.host, url.port or 80), timeout=10)
    head = (
        "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        f"Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    )
    way.sendall(head.encode())
    # Said when the body begins to be read.
    told = way.recv(1000)
    assert told.startswith((b"HTTP/1.1 100", b"HTTP/1.1 429")), told
    way.sendall(sent)
    return way


def test_bodies_that_do_not_come_hold_a_place_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not until the deadline, whatever length they announce."""
    monkeypatch.setattr(body, "GRACE_SECONDS", 0.5)
    with running(open_requests=2) as live, stalled(live, 19_000_000) as one, stalled(live) as two:
        reply = live.client.post("/v1/classify", content=b"x", headers=PNG)
        assert (reply.status_code, error(reply)["code"]) == (429, "busy")
        for way in (one, two):
            assert way.recv(1000).startswith(b"HTTP/1.1 408")
        assert live.client.post("/v1/classify", content=b"x", headers=PNG).status_code == 400


def test_bodies_that_keep_up_their_pace_have_the_time_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body, "GRACE_SECONDS", 0.5)
    with running() as live, stalled(live, 60_001, bytes(60_000)) as way:
        threading.Event().wait(1.0)
        way.sendall(b"x")
        assert way.recv(1000).startswith(b"HTTP/1.1 400")


def test_one_caller_leaves_places_for_others() -> None:
    door = Door(places=8, held_bytes=800)
    with ExitStack() as inside:
        for _ in range(6):
            inside.enter_context(door.place("greedy"))
        with pytest.raises(Refusal, match="6 requests of yours") as told, door.place("greedy"):
            pass
        assert (told.value.status, told.value.headers["Retry-After"]) == (429, "1")
        inside.enter_context(door.place("a"))
        inside.enter_context(door.place("b"))
        with pytest.raises(Refusal, match="Too many requests"), door.place("c"):
            pass
    with door.place("greedy") as place:
        assert place.held == 0


def test_bytes_of_bodies_are_bounded() -> None:
    door = Door(places=8, held_bytes=800)
    with door.place("greedy") as place, door.place("other") as more:
        place.hold(600)
        with pytest.raises(Refusal, match="600 bytes of yours"):
            place.hold(1)
        more.hold(200)
        with pytest.raises(Refusal, match="Too many bytes"):
            more.hold(1)
    with door.place("greedy") as place:
        place.hold(600)


def test_uploads_that_are_held_are_bounded_in_bytes() -> None:
    """However many places there are: eight of the largest uploads do not fit at once."""
    upload = {"max_upload_bytes": 100_000, "max_batch_bytes": 100_000, "max_json_bytes": 1000}
    with running(**upload) as live, ExitStack() as lines:
        ways = [
            lines.enter_context(stalled(live, 100_000, bytes(70_000 if n < 2 else 20_000)))
            for n in range(3)
        ]
        assert ways[2].recv(1000).startswith(b"HTTP/1.1 429")


def test_request_id_is_kept_if_harmless(live: Live) -> None:
    given = live.client.get("/v1/model", headers={"x-request-id": "ward-7.12"})
    assert given.headers["x-request-id"] == "ward-7.12"
    strange = live.client.get("/v1/model", headers={"x-request-id": "a b\\n<script>"})
    assert re.fullmatch("[0-9a-f]{32}", strange.headers["x-request-id"])


def test_document_covers_every_route_with_the_bounds_of_the_bundle(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    told = set(document["paths"])
    ours = {path for path in paths() if not path.startswith("/static/")}
    # The schema of BentoML's own routes says nothing of ours.
    assert told == (ours | {"/static/{file}"}) - {"/schema.json"}
    fields = document["components"]["schemas"]["GenerateRequest"]["properties"]
    assert fields["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 50}
    assert fields["width"]["default"] == 64
    assert fields["width"]["anyOf"][0]["multipleOf"] == 16
    lesion = document["components"]["schemas"]["LesionAttributes"]["properties"]
    assert set(VOCABULARY["diagnosis"]) < set(lesion["diagnosis"]["enum"])
    names = set(document["components"]["schemas"])
    assert set(re.findall(r"#/components/schemas/(\w+)", str(document))) <= names


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        ({"prompt": "dermoscopic image of a benign lesion"}, True),
        ({"lesion": {"label": "benign"}}, True),
        ({"prompt": "dermoscopic image of a benign lesion", "lesion": None}, True),
        ({"prompt": None, "lesion": {"label": "benign"}}, True),
        ({}, False),
        ({"prompt": None, "lesion": None}, False),
        ({"prompt": "x", "lesion": {"label": "benign"}}, False),
    ],
)
def test_document_wants_a_prompt_or_a_lesion_as_the_service_does(
    live: Live, body: dict[str, object], valid: bool
) -> None:
    schemas = live.client.get("/openapi.json").json()["components"]["schemas"]

    def holds(branch: dict[str, Any]) -> bool:
        """JSON Schema's `required`, and `properties` as far as null is concerned."""
        null = {name: "not" not in rule for name, rule in branch["properties"].items()}
        return all(name in body for name in branch["required"]) and all(
            (body[name] is None) == null[name] for name in body
        )

    branches = schemas["GenerateRequest"]["oneOf"]
    assert [holds(branch) for branch in branches].count(True) == valid
    reply = live.client.post("/v1/generate", json=body)
    assert reply.status_code == (200 if valid else 422)


def test_card_tells_what_serves(live: Live) -> None:
    card = live.client.get("/v1/model").json()
    assert "not a medical device" in card["notice"]
    assert (card["name"], card["bundle"]) == ("tiny", "0123456789abcdef")
    assert card["vocabulary"]["colors"] == list(VOCABULARY["colors"])
    assert card["diagnoses"]["melanoma"] == "malignant"
    assert card["engines"][0]["reason"] == "a test"
    assert card["engines"][0]["rejected"] == [{"name": "other", "why": "not here"}]
    assert card["engines"][0]["device"] == "cpu"
    assert card["turns"] == [[*GENERATOR_PARTS]]
    assert (card["limits"]["min_upload_side"], card["limits"]["max_upload_ratio"]) == (64, 4)
    assert card["classifier"]["abstain"] == [0.3, 0.5]
    assert card["licences"][0]["licence"] == "CC0-1.0"


def test_page_has_no_outside_address_and_nothing_inline() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|data:[a-z]+/", text), file
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    named = set(re.findall(r'(?:src|href)="(static/[^"#]+)', page))
    assert {f"/{name}" for name in named} <= paths()


def test_known_paths_are_those_that_answer(live: Live) -> None:
    for path in paths() - set(SYSTEM_PATHS):
        assert live.client.get(path).status_code in (200, 405), path


def test_settings_are_read_from_the_environment() -> None:
    read = Settings.from_environment(
        {
            "DERMAFLUX_BUNDLE": "/srv/bundle",
            "DERMAFLUX_DEADLINE_SECONDS": "2.5",
            "DERMAFLUX_WAITING": " 0 ",
            "DERMAFLUX_THREADS": "",
            "PATH": "/bin",
        }
    )
    assert read == Settings(bundle=Path("/srv/bundle"), deadline_seconds=2.5, waiting=0)
    assert Settings.from_environment({}) == Settings()
    assert Settings().golden
    assert not Settings.from_environment({"DERMAFLUX_GOLDEN": "0"}).golden


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WAITNG", "3"),
        ("WAITING", "-1"),
        ("WAITING", "1.5"),
        ("THREADS", "0"),
        ("DEADLINE_SECONDS", "nan"),
        ("DEADLINE_SECONDS", "inf"),
        ("DEADLINE_SECONDS", "soon"),
        ("GOLDEN", "no"),
    ],
)
def test_senseless_settings_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"DERMAFLUX_{name}"):
        Settings.from_environment({f"DERMAFLUX_{name}": value})
