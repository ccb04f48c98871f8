"""What serves, and how its queue stands, as each caller may know it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from serving.keys import line, made
from tests.serving.live import running, until

BENIGN = {"lesion": {"label": "benign"}}
WARD, CLINIC = (made(name, ["generate"]) for name in ("ward", "clinic"))
OPERATOR = made("operator", ["admin", "generate"])
LINES = "\n".join(line(entry) for _, entry in (WARD, CLINIC, OPERATOR))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_queue_shows_all_counts_and_only_ones_own_places() -> None:
    with running(keys_inline=LINES, batch=1) as live, ThreadPoolExecutor(2) as pool:

        def ask(key: str, n: int) -> int:
            reply = live.client.post("/v1/generate", json={**BENIGN, "n": n}, headers=bearer(key))
            return reply.status_code

        empty = live.client.get("/v1/queue", headers=bearer(WARD[0])).json()
        assert (empty["waiting"], empty["running"], empty["mine"]) == (0, 0, [])
        assert (empty["limit"], empty["draining"]) == (1, False)
        with live.brake.closed():
            first = pool.submit(ask, WARD[0], 2)
            live.brake.wait_for(1)
            second = pool.submit(ask, CLINIC[0], 2)
            until(lambda: live.count("dermaflux_images_waiting") == 3)
            ward = live.client.get("/v1/queue", headers=bearer(WARD[0]))
            clinic = live.client.get("/v1/queue", headers=bearer(CLINIC[0]))
            live.brake.open.set()
        assert (first.result(), second.result()) == (200, 200)
    for reply in (ward, clinic):
        assert reply.headers["cache-control"] == "no-store"
        assert (reply.json()["waiting"], reply.json()["running"]) == (3, 1)
        assert reply.json()["backlog_seconds"] > 0
    # One is drawn; then callers take turns, whoever came first.
    assert sorted([*ward.json()["mine"], *clinic.json()["mine"]]) == [0, 1, 2, 3]
    assert min(ward.json()["mine"]) == 0
    assert min(clinic.json()["mine"]) in (1, 2)


def test_card_says_who_asks_and_keeps_from_them_what_is_the_operators() -> None:
    with running(keys_inline=LINES) as live:
        ward, operator = (
            live.client.get("/v1/model", headers=bearer(key)).json()
            for key in (WARD[0], OPERATOR[0])
        )
    assert (ward["caller"], ward["roles"]) == ("ward", ["generate"])
    assert (operator["caller"], operator["roles"]) == ("operator", ["admin", "generate"])
    assert ward["engines"][0]["rejected"] == []
    assert operator["engines"][0]["rejected"] == [{"name": "other", "why": "not here"}]
    assert ward["limits"]["max_images"] == 8
    assert ward["batch"] == {"limit": 1, "rates": {}}
