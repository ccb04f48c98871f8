"""Who may do what: keys, roles, callers without keys, and doors that nobody meant to open."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from serving.access import (
    Access,
    Admission,
    Caller,
    ClosedDoorError,
    caller_of,
    refuse_open_door,
)
from serving.addresses import FAILURES, NETWORKS, REGAIN_SECONDS, Failures, network
from serving.app import ROUTES
from serving.keyring import ROLES, Keyring
from serving.keys import line, made
from serving.replies import Refusal
from serving.settings import Settings
from tests.serving.live import Live, picture, running
from tests.serving.test_generate import error

LESION = {"lesion": {"label": "benign"}, "steps": 1}
RIGHTS = {role: made(f"holder-{role}", [role]) for role in ROLES}
KEYS = {role: key for role, (key, _) in RIGHTS.items()}
LINES = "\n".join(line(entry) for _, entry in RIGHTS.values())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    with running(keys_inline=LINES) as live:
        yield live


def test_every_route_wants_its_role_before_it_reads_anything(guarded: Live) -> None:
    for path, (method, whom) in ROUTES.items():
        reply = guarded.client.request(method, path)
        if whom == "anybody":
            assert reply.status_code == 200, path
            continue
        assert reply.status_code == 401, path
        assert reply.headers["www-authenticate"] == 'Bearer realm="DermaFlux"'
        assert "Bearer KEY" in reply.json()["error"]["message"]
        for role in ROLES:
            # Of another type than the route takes: whoever is let in is told that.
            reply = guarded.client.request(
                method, path, headers=bearer(KEYS[role]) | {"content-type": "text/plain"}
            )
            allowed = whom in ("known", role)
            assert (reply.status_code == 403) != allowed, (path, role)
            assert reply.status_code in (200, 403, 415), path
            if not allowed:
                assert f"the role {whom} is needed" in reply.json()["error"]["message"]
                assert f'scope="{whom}"' in reply.headers["www-authenticate"]


def test_open_paths_ask_nobody(guarded: Live) -> None:
    for path in ("/", "/static/main.js", "/openapi.json", "/readyz", "/nothing"):
        for headers in ({}, bearer("wrong")):
            assert guarded.client.get(path, headers=headers).status_code in (200, 404), path


def test_key_comes_in_either_header(guarded: Live) -> None:
    key = KEYS["classify"]
    for headers in (
        bearer(key),
        {"authorization": f"bearer {key}"},
        {"X-API-Key": key},
        # A proxy before the service may have its own use of one of them.
        {"X-API-Key": key, "Authorization": "Basic dXNlcjpwYXNz"},
        {"X-API-Key": key} | bearer("of-the-proxy"),
        {"X-API-Key": "of-the-proxy"} | bearer(key),
    ):
        reply = guarded.client.get("/v1/model", headers=headers)
        assert reply.json()["roles"] == ["classify"], headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": KEYS["admin"]},
        {"X-API-Key": ""},
        {"X-API-Key": KEYS["admin"][:-1]},
        {"X-API-Key": KEYS["admin"] + "x"},
        {"X-API-Key": KEYS["admin"].upper()},
        {"X-API-Key": "x" * 5000},
        {"X-API-Key": "\u00e9\u00ff".encode("latin-1")},
        {"Cookie": f"key={KEYS['admin']}"},
    ],
)
def test_what_is_no_key_is_refused(headers: dict[str, str]) -> None:
    with running(keys_inline=LINES) as live:
        reply = live.client.get("/v1/model", headers=headers)
        assert (reply.status_code, error(reply)["code"]) == (401, "unauthorized")
        assert live.client.get(f"/v1/model?key={KEYS['admin']}").status_code == 401


def test_roles_do_not_imply_each_other(guarded: Live) -> None:
    def draws(role: str, body: dict[str, object]) -> int:
        reply = guarded.client.post("/v1/generate", headers=bearer(KEYS[role]), json=body)
        return reply.status_code

    def classifies(role: str) -> int:
        headers = bearer(KEYS[role]) | {"content-type": "image/png"}
        return guarded.client.post(
            "/v1/classify", headers=headers, content=picture(200)
        ).status_code

    assert [draws(role, LESION) for role in ROLES] == [200, 403, 403, 403]
    assert [classifies(role) for role in ROLES] == [403, 200, 403, 403]
    # The right to free text is worth nothing without the right to draw.
    assert draws("free-text", {"prompt": "my own words", "steps": 1}) == 403
    assert draws("generate", {"prompt": "my own words", "steps": 1}) == 403


def test_free_text_is_a_right(guarded: Live) -> None:
    key, entry = made("writer", ["generate", "free-text"])
    with running(keys_inline=line(entry)) as live:
        body = {"prompt": "my own words", "steps": 1}
        reply = live.client.post("/v1/generate", json=body, headers=bearer(key))
        assert reply.status_code == 200
    with running() as live:
        reply = live.client.post("/v1/generate", json=body)
        assert (reply.status_code, error(reply)["code"]) == (403, "forbidden")
        assert "lesion" in str(error(reply)["message"])
    with running(anonymous_roles=("generate", "free-text")) as live:
        assert live.client.post("/v1/generate", json=body).status_code == 200
        assert live.client.post("/v1/classify", content=picture(1)).status_code == 403


def test_caller_is_told_its_roles_and_an_operator_more(guarded: Live) -> None:
    cards = {
        role: guarded.client.get("/v1/model", headers=bearer(key)).json()
        for role, key in KEYS.items()
    }
    assert {role: card["roles"] for role, card in cards.items()} == {role: [role] for role in ROLES}
    rejected = {role: bool(card["engines"][0]["rejected"]) for role, card in cards.items()}
    assert rejected == {role: role == "admin" for role in ROLES}
    with running() as live:
        card = live.client.get("/v1/model").json()
        assert card["roles"] == ["classify", "generate"]
        assert card["engines"][0]["rejected"]


def test_metrics_are_for_the_operator_unless_they_are_open(guarded: Live) -> None:
    assert guarded.client.get("/metrics", headers=bearer(KEYS["admin"])).status_code == 200
    with running(keys_inline=LINES, metrics_open=True) as live:
        text = live.client.get("/metrics").text
        assert "# TYPE dermaflux_requests_total counter" in text
    with running() as live:
        assert live.client.get("/metrics").status_code == 200


def test_keys_are_taken_and_revoked_while_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text(LINES)
    ring = Keyring(file, clock=iter(range(1000)).__next__)
    access = Access(Settings(), ring)
    key, entry = made("late", ["admin"])
    assert refused(access, bearer(key)) == 401
    file.write_text(f"{LINES}\n{line(entry)}")
    assert admitted(access, bearer(key)).name == "late"
    file.write_text(LINES)
    assert refused(access, bearer(key)) == 401


def asked(headers: dict[str, str] | None = None, address: str = "127.0.0.1") -> Request:
    given = {"host": "localhost:3000"} | (headers or {})
    pairs = [(name.lower().encode(), text.encode()) for name, text in given.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": pairs}
    return Request({**scope, "client": (address, 5)})


def admitted(access: Access, headers: dict[str, str] | None = None, **where: str) -> Caller:
    return access.caller(asked(headers, **where))


def refused(access: Access, headers: dict[str, str] | None = None, **where: str) -> int:
    with pytest.raises(Refusal) as told:
        access.caller(asked(headers, **where))
    return told.value.status


@pytest.mark.parametrize(
    ("address", "lane"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.9.9.9", "127.9.9.9"),
        # Of an IPv6 address whoever has it can change half at will.
        ("::1", "::/64"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_without_keys_this_machine_is_answered(address: str, lane: str) -> None:
    caller = admitted(Access(Settings(), None), bearer("whatever"), address=address)
    assert (caller.name, caller.roles) == ("anonymous", {"generate", "classify"})
    assert caller.may("admin")
    assert not caller.may("free-text")
    assert caller.lane == f"anonymous {lane}"


@pytest.mark.parametrize("address", ["10.0.0.7", "fe80::1", "::ffff:10.0.0.7", "0.0.0.0"])
def test_without_keys_strangers_are_not(address: str) -> None:
    assert refused(Access(Settings(), None), address=address) == 401
    assert admitted(Access(Settings(open=True), None), address=address).roles


@pytest.mark.parametrize("name", ["Forwarded", "Via", "X-Forwarded-For", "X-Real-IP"])
def test_without_keys_a_proxy_on_this_machine_lets_no_stranger_in(name: str) -> None:
    """Its callers have its address; nor can a program of this machine choose its lane so."""
    assert refused(Access(Settings(), None), {name: "127.1.2.3"}) == 401
    assert admitted(Access(Settings(open=True), None), {name: "127.1.2.3"}).roles


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("localhost", True),
        ("LocalHost.:3000", True),
        ("app.localhost:3000", True),
        ("127.0.0.1:3000", True),
        ("[::1]:3000", True),
        ("evil.example:3000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.7:3000", False),
        ("", False),
    ],
)
def test_page_that_has_its_name_resolved_to_this_machine_is_not_taken_for_ours(
    host: str, ours: bool
) -> None:
    access = Access(Settings(), None)
    if ours:
        assert admitted(access, {"host": host}).roles
    else:
        assert refused(access, {"host": host}) == 401
    # Where everybody is meant to reach it, it has names that nobody here knows.
    assert admitted(Access(Settings(open=True), None), {"host": host}).roles
    ring = Access(Settings(), Keyring(None, LINES))
    assert admitted(ring, {"host": host} | bearer(KEYS["admin"])).roles


def test_pages_of_other_sites_do_not_post_in_the_name_of_who_looks_at_them() -> None:
    for access in (Access(Settings(), None), Access(Settings(open=True), None)):
        assert refused(access, {"sec-fetch-site": "cross-site"}) == 403
        for site in ("same-origin", "none", "same-site"):
            assert admitted(access, {"sec-fetch-site": site}).roles


def test_keys_hold_for_this_machine_too() -> None:
    access = Access(Settings(open=True, keys_inline=LINES), Keyring(None, LINES))
    assert refused(access) == 401
    assert admitted(access, bearer(KEYS["admin"])).lane == "holder-admin"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7"])
def test_door_is_not_opened_by_accident(host: str) -> None:
    with pytest.raises(ClosedDoorError, match=rf"{host} without keys.*DERMAFLUX_OPEN=1"):
        refuse_open_door(Settings(), host)
    refuse_open_door(Settings(open=True), host)
    refuse_open_door(Settings(keys_inline=LINES), host)


def test_this_machine_needs_no_keys() -> None:
    for host in ("127.0.0.1", "::1", None):
        refuse_open_door(Settings(), host)  # raises where it refuses
    assert admitted(Access(Settings(), None)).keyed is False


def test_wrong_keys_are_bounded_and_right_ones_always_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    access = Access(Settings(), Keyring(None, LINES), clock=lambda: now[0])
    wrong = bearer("wrong")
    with caplog.at_level(logging.WARNING):
        told = [refused(access, wrong, address="10.0.0.7") for _ in range(FAILURES + 5)]
    assert told == [401] * FAILURES + [429] * 5
    assert len(caplog.records) == FAILURES
    assert all("wrong key from 10.0.0.7" in one.message for one in caplog.records)
    # Whoever shares the address is not kept out by it, and others are not either.
    assert admitted(access, bearer(KEYS["admin"]), address="10.0.0.7").name == "holder-admin"
    assert refused(access, wrong, address="10.0.0.8") == 401
    now[0] += REGAIN_SECONDS
    assert [refused(access, wrong, address="10.0.0.7") for _ in range(2)] == [401, 429]


def test_memory_of_failures_is_bounded() -> None:
    failures = Failures(clock=lambda: 0.0)
    for number in range(3 * NETWORKS):
        failures.count(network(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"))
    assert len(failures) == NETWORKS
    # One who holds a whole network of IPv6 has one bucket.
    assert network("2001:db8::1") == network("2001:db8::ffff") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.7") == network("10.0.0.7")


def test_caller_that_nobody_looked_for_is_a_fault_and_no_way_in() -> None:
    with pytest.raises(AttributeError):
        caller_of(asked())


def test_proxy_on_this_machine_that_tells_of_a_stranger_is_believed() -> None:
    with running() as live:
        near = httpx.get(f"{live.url}/v1/model")
        far = httpx.get(f"{live.url}/v1/model", headers={"X-Forwarded-For": "10.0.0.7"})
        assert (near.status_code, far.status_code) == (200, 401)


def test_admission_leaves_other_protocols_alone() -> None:
    import asyncio

    seen: list[dict[str, object]] = []

    async def app(scope: dict[str, object], *_: object) -> None:
        seen.append(scope)

    admission = Admission(app, Access(Settings(), None))  # type: ignore[arg-type]
    asyncio.run(admission({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
