"""What reaches the audit log of a request, and what a caller gets where it cannot be recorded."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import os
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from serving.audit import log as writing
from serving.audit.ending import files_of
from serving.audit.log import AuditLog, Rules
from serving.audit.middleware import Audited, recorded
from serving.audit.record import answer_hash
from serving.audit.results import Results
from serving.audit.secret import AuditError

PIXELS, ANSWER = "a" * 64, {"label": "benign"}
PROMPT = "the mole of John Smith"


class Admitted:
    """Stands for what tells the caller."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            Request(scope).state.caller = SimpleNamespace(name="ward3")
        await self._app(scope, receive, send)


@pytest.fixture
def house(tmp_path):
    """An app whose routes are audited: `ask(path)` -> reply; `lines()` -> what was recorded."""
    worked = []

    def told(path: str, endpoint: Callable):
        async def answer(request: Request):
            request.state.route = path
            worked.append(path)
            return await endpoint(request)

        return Route(path, answer, methods=["GET", "POST"])

    async def classify(request: Request):
        request.state.results = [answer_hash(ANSWER)]
        return JSONResponse(ANSWER)

    async def refuse(request: Request):
        return JSONResponse({}, status_code=int(request.query_params["status"]))

    async def fall(request: Request):
        raise RuntimeError(PROMPT)

    async def leave(request: Request):
        raise asyncio.CancelledError

    async def stream(request: Request):
        async def events():
            yield "event: step\n\n"
            try:
                await recorded(request, "done", [PIXELS])
            except AuditError:
                yield "event: error\n\n"
            else:
                yield "event: image\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def silent(request: Request):
        async def events():
            yield "event: step\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    routes = {
        "/v1/classify": classify, "/v1/refused": refuse, "/v1/fall": fall, "/v1/leave": leave,
        "/v1/stream": stream, "/v1/silent": silent, "/readyz": classify, "/metrics": refuse,
    }  # fmt: skip

    def build(addresses: bool = False, **rules):
        log = AuditLog.open(tmp_path / "audit", tmp_path / "key", Rules(fsync="never", **rules))
        app = Starlette(
            routes=[told(path, endpoint) for path, endpoint in routes.items()],
            middleware=[
                Middleware(Audited, log=log, bundle="0" * 16, addresses=addresses),
                Middleware(Admitted),
            ],
        )

        async def asked(path: str, method: str):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, content=PROMPT)

        def lines():
            data = b"".join(file.read_bytes() for file in files_of(tmp_path / "audit"))
            assert PROMPT.encode() not in data
            found = [json.loads(line) for line in data.splitlines()]
            return [one for one in found if one["event"] == "request"]

        return SimpleNamespace(
            log=log, folder=tmp_path / "audit", worked=worked, lines=lines,
            ask=lambda path, method="POST": asyncio.run(asked(path, method)),
        )  # fmt: skip

    return build


def told(line) -> dict:
    return {
        name: line[name]
        for name in ("route", "outcome", "status", "results", "caller")
        if name in line
    }


def test_who_did_what_and_what_came_out(house):
    site = house()
    assert site.ask(f"/v1/classify?name={PROMPT}").json() == ANSWER
    assert site.ask("/v1/refused?status=422").status_code == 422
    assert site.ask("/v1/refused?status=503").status_code == 503
    first, second, third = map(told, site.lines())
    who = {"caller": "ward3"}
    assert first == {
        "route": "/v1/classify", "outcome": "done", "status": 200,
        "results": [answer_hash(ANSWER)], **who,
    }  # fmt: skip
    assert second == {"route": "/v1/refused", "outcome": "refused", "status": 422, **who}
    assert third["outcome"] == "failed"
    line = site.lines()[0]
    assert line["bundle"] == "0" * 16
    assert line["request"]
    assert "address" not in line


def test_probes_are_not_recorded_but_who_was_turned_away_is(house):
    site = house(addresses=True)
    site.ask("/readyz", "GET")
    site.ask("/nowhere", "GET")
    site.ask("/metrics?status=200", "GET")
    assert site.lines() == []
    site.ask("/metrics?status=401", "GET")
    site.ask("/metrics?status=403", "GET")
    assert [line["status"] for line in site.lines()] == [401, 403]
    assert site.lines()[0]["address"] == "127.0.0.1"


def test_what_falls_and_who_leaves(house):
    site = house()
    assert site.ask("/v1/fall").status_code == 500
    with pytest.raises(asyncio.CancelledError):
        site.ask("/v1/leave")
    assert [line["outcome"] for line in site.lines()] == ["failed", "left"]


def test_streams_are_recorded_once_before_their_result(house):
    site = house()
    assert "event: image" in site.ask("/v1/stream").text
    site.ask("/v1/silent")
    first, second = site.lines()
    assert first["results"] == [PIXELS]
    assert first["outcome"] == "done"
    assert second["outcome"] == "ended"
    assert "results" not in second


def full(monkeypatch) -> None:
    def write(descriptor: int, data) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)


def test_what_cannot_be_recorded_is_not_answered(house, monkeypatch):
    site = house(required=True)
    full(monkeypatch)
    reply = site.ask("/v1/classify")
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "60"
    assert reply.json()["error"]["code"] == "not_ready"
    assert "benign" not in reply.text
    reply = site.ask("/v1/stream")
    assert "event: image" not in reply.text
    assert "event: error" in reply.text


def test_a_reply_that_is_held_back_is_wholly_held_back(tmp_path, monkeypatch):
    log = AuditLog.open(tmp_path / "audit", tmp_path / "key", Rules(fsync="never"))

    async def app(scope, receive, send) -> None:
        Request(scope).state.route = "/v1/classify"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"benign"})

    sent = []

    async def send(message) -> None:
        sent.append(message)

    full(monkeypatch)
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], "state": {}}
    asyncio.run(Audited(app, log, "0" * 16)(scope, None, send))
    assert [one["type"] for one in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert b"benign" not in sent[1]["body"]


def test_no_work_is_begun_where_the_disk_is_full(house, monkeypatch):
    site = house(required=True)
    monkeypatch.setattr(writing, "ROOM", 2**70)
    assert site.ask("/v1/classify").status_code == 503
    assert site.worked == []
    assert site.ask("/readyz", "GET").status_code == 200


def test_where_records_may_be_lost_the_answer_goes_out(house, monkeypatch):
    site = house(required=False)
    with monkeypatch.context() as patch:
        full(patch)
        assert site.ask("/v1/classify").json() == ANSWER
        assert "event: image" in site.ask("/v1/stream").text
    assert site.lines() == []
    site.ask("/v1/classify")
    assert len(site.lines()) == 1


def test_results_are_found_again(house):
    site = house()
    site.ask("/v1/classify")
    site.ask("/v1/stream")
    found = Results(site.folder)
    assert found.known(PIXELS)
    assert found.known(answer_hash(ANSWER))
    assert not found.known("b" * 64)
    assert not found.known(site.lines()[0]["prev"])
    assert not found.known("a" * 63 + "\n")
    assert not Results(site.folder / "absent").known(PIXELS)


def test_without_an_audit_log_nothing_happens():
    scope = {"type": "http", "headers": [], "state": {}}
    before = copy.deepcopy(scope)
    asyncio.run(recorded(Request(scope), "done", [PIXELS]))
    assert scope == before
