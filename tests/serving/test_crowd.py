"""Two hundred callers at once: every answer is a result, 429 or 504, and everyone gets their own.

The service is a process of its own, as in use, with graphs that draw in milliseconds: it is not its
speed that is looked at, but that nothing is lost, mixed up, kept or held up where all come at once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks import processes
from benchmarks.sending import events
from tests.core.test_doctor import with_golden
from tests.serving.live import running, until
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
CALLERS = 200
ADDRESSES = 25
"""The callers come from so many; they share the queue by address, as they have no keys."""
ROUNDS = 3
TRIES = 12
PAUSE = 0.3
"""Seconds. One who is told to come back does after this, not after the seconds that were told, so
that the crowd stays one."""
STEPS = 6
ALLOWED = {200, 429, 504}
PROBE_SECONDS = 0.5
SPARE = 10
"""Files that a pool may have opened for good; the callers have opened two hundred."""
FLAT_BYTES = 24_000_000
"""Of a service of 490 MB, over two rounds of 300 requests: pools and caches are full after the
first, and 40 kB that stay of every request would be more. Measured: 3 MB."""

PROBER = """
import http.client, json, sys, threading, time
port, process = int(sys.argv[1]), sys.argv[2]
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
def used():
    with open(f"/proc/{process}/task/{process}/schedstat") as stream:
        return int(stream.read().split()[0]) / 1e9
waits = []
while not ended.wait(0.02):
    for path in ("/livez", "/readyz"):
        begin, before = time.monotonic(), used()
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request("GET", path)
        assert line.getresponse().status == 200, path
        line.close()
        waits.append([time.monotonic() - begin, used() - before])
print(json.dumps(waits))
"""
"""Probes from a process of its own. Beside the seconds of each stand those of processor time that
the service's event loop used meanwhile: what stood before it in line, where this machine is shared
and the seconds tell more of the others.
"""


@dataclass(frozen=True)
class Ask:
    """One request; those of one `key` ask for the same."""

    path: str
    body: bytes
    kind: str
    leaves: bool = False

    @property
    def key(self) -> tuple[str, bytes]:
        return self.path.removesuffix("/stream"), self.body


@dataclass
class Got:
    """What became of all requests of a crowd."""

    statuses: Counter[int] = field(default_factory=Counter)
    results: list[tuple[Ask, Any]] = field(default_factory=list)
    left: int = 0


@dataclass(frozen=True)
class Served:
    """A running service and its first process."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> int:
        return processes.seen(processes.family([self.pid])).rss_bytes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("crowd")
    bundle = with_golden(write_bundle(folder / "bundle"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DERMAFLUX_", "BENTOML_", "PROMETHEUS_"))
    }
    own = {
        "BENTOML_HOME": str(folder / "home"),
        "BENTOML_DO_NOT_TRACK": "true",
        "DERMAFLUX_BUNDLE": str(bundle.path),
        "DERMAFLUX_WAITING": "24",
        "DERMAFLUX_OPEN_REQUESTS": str(CALLERS),
    }
    command = ["-m", "bentoml", "serve", "serving.service:DermaFlux", "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            cwd=ROOT, env={**kept, **own}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            until(lambda: process.poll() is not None or _ready(client), seconds=120)
        assert process.poll() is None, (folder / "log").read_text()
        yield Served(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "log").read_text()
    assert "Traceback" not in (folder / "log").read_text()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def asked(number: int) -> Ask:
    """The request of a number: one picture or two, a stream, one that is left, photographs."""
    match number % 10:
        case 6 | 7 | 8:
            return Ask("/v1/classify", photograph(number), "image/png")
        case 9:
            return Ask("/v1/classify/batch", *form(number))
        case turn:
            size = 64 if number % 4 else 96
            lesion = {"label": ("benign", "malignant")[number // 10 % 2]}
            body = {"lesion": lesion, "seed": 2 * number, "steps": STEPS,
                    "width": size, "height": size, "n": 1 + (turn == 2)}  # fmt: skip
            path = "/v1/generate/stream" if turn >= 3 else "/v1/generate"
            return Ask(path, json.dumps(body).encode(), "application/json", leaves=turn == 5)


def photograph(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, 3) + random.integers(-9, 9, (96, 80, 1))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def form(number: int) -> tuple[bytes, str]:
    """Two photographs and between them what is none."""
    files = (photograph(10**6 + number), b"none", photograph(2 * 10**6 + number))
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n%b\r\n' % file
        for file in files
    )
    return b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


async def answered(session: aiohttp.ClientSession, ask: Ask, got: Got) -> bool:
    """Send it once; whether the caller is done."""
    header = {"Content-Type": ask.kind}
    async with session.post(ask.path, data=ask.body, headers=header) as reply:
        got.statuses[reply.status] += 1
        if reply.status != 200:
            told = (await reply.json())["error"]
            assert (reply.status, told["code"]) in {(429, "busy"), (504, "deadline")}, told
            assert reply.status != 429 or int(reply.headers["retry-after"]) >= 1
            return reply.status == 504
        if ask.path.startswith("/v1/classify"):
            got.results.append((ask, without_ids(await reply.json())))
        elif ask.path == "/v1/generate":
            got.results.append((ask, pictures_of(await reply.read())))
        else:
            async for name, data in events(reply.content.iter_any()):
                assert "error" not in data, data
                # One who reads slowly is told of the newest step alone.
                if ask.leaves and name == "progress" and data["step"] >= STEPS // 2:
                    got.left += 1
                    reply.close()
                    return True
                if name == "image":
                    got.results.append((ask, pictures_of(base64.b64decode(data["file"]))))
    return True


def without_ids(told: Any) -> Any:
    """An answer but for the id of its request."""
    if isinstance(told, list):
        return [without_ids(one) for one in told]
    if isinstance(told, dict):
        return {name: without_ids(one) for name, one in told.items() if name != "request_id"}
    return told


def pictures_of(file: bytes) -> tuple[str, ...]:
    """The pixels of a picture, or of each in a zip; files may tell when they were made."""
    if file.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(file)) as packed:
            inside = [packed.read(name) for name in sorted(packed.namelist())]
        return tuple(one for file in inside for one in pictures_of(file))
    with Image.open(io.BytesIO(file)) as picture:
        pixels = np.asarray(picture)
    return (hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(),)


async def crowd(url: str, first: int, got: Got) -> None:
    """`CALLERS` requests at once, from many addresses of this machine."""
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(
                    url,
                    connector=aiohttp.TCPConnector(
                        limit=0, local_addr=(f"127.0.0.{2 + number}", 0), force_close=True
                    ),
                    timeout=aiohttp.ClientTimeout(total=60),
                )
            )
            for number in range(ADDRESSES)
        ]

        async def come(number: int) -> None:
            ask = asked(first + number)
            for _ in range(TRIES):
                if await answered(sessions[number % ADDRESSES], ask, got):
                    return
                await asyncio.sleep(PAUSE)

        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(come(number))


async def alone(url: str, asks: list[Ask]) -> dict[tuple[str, bytes], Any]:
    """What each gives while nobody else asks."""
    got = Got()
    async with aiohttp.ClientSession(url) as session:
        for ask in {ask.key: ask for ask in asks}.values():
            await answered(session, Ask(*ask.key, ask.kind), got)
    assert got.statuses.keys() == {200}
    return {ask.key: result for ask, result in got.results}


@contextmanager
def probed(served: Served) -> Iterator[list[list[float]]]:
    """Probes all the while; afterwards, of each, seconds and those of the loop."""
    found: list[list[float]] = []
    # All of them hold the socket; one answers.
    (service,) = (
        pid
        for pid in processes.listening(served.port)
        if b"--service-name\0dermaflux\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    prober = subprocess.Popen(
        [sys.executable, "-c", PROBER, str(served.port), str(service)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield found
        told, _ = prober.communicate(timeout=90)
        assert prober.returncode == 0, "a probe did not answer 200"
        found += json.loads(told)
    finally:
        prober.kill()
        prober.wait()


def test_a_crowd_gets_results_of_its_own_or_is_told_to_come_back(served: Served) -> None:
    got = Got()
    memory = []
    with probed(served) as probes:
        for number in range(ROUNDS):
            asyncio.run(crowd(served.url, number * CALLERS, got))
            memory.append(served.memory())
    assert set(got.statuses) <= ALLOWED, got.statuses
    # Enough came through and enough was refused for this to say something.
    assert got.statuses[429] > 20
    assert len(got.results) > ROUNDS * CALLERS * 0.6
    assert got.left > 10
    assert len(got.results) + got.left == got.statuses[200], "an answer of 200 without its result"

    expected = asyncio.run(alone(served.url, [ask for ask, _ in got.results]))
    pictures = [one for key, told in expected.items() if key[0] == "/v1/generate" for one in told]
    assert len(set(pictures)) == len(pictures) > 200, "two of them could not be told apart"
    forms = [told["results"] for (path, _), told in expected.items() if path.endswith("/batch")]
    assert len(forms) > 20
    # What is no photograph is told in its place, and its neighbours have their answers.
    assert all([one["result"] is None for one in form] == [False, True, False] for form in forms)
    single = [told for (path, _), told in expected.items() if path == "/v1/classify"]
    assert len({told["probability"] for told in single}) > len(single) * 0.9 > 100
    wrong = [ask for ask, result in got.results if result != expected[ask.key]]
    assert not wrong, f"{len(wrong)} of {len(got.results)} are not what they are alone: {wrong[:3]}"

    assert len(probes) > 20
    slowest, used = max(probes, key=min)
    assert min(slowest, used) < PROBE_SECONDS, f"{slowest:.2f} s, {used:.2f} s of the loop"
    # The first round fills pools and caches.
    assert max(memory[1:]) - memory[0] < FLAT_BYTES, [f"{one / 1e6:.0f} MB" for one in memory]


def test_nothing_is_held_once_the_crowd_has_gone(served: Served) -> None:
    """No file, no place: who left half way, and who was refused, keep nothing."""
    pids = processes.family([served.pid])
    before = processes.seen(pids)
    asyncio.run(crowd(served.url, 10_000, Got()))
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as client:

        def free() -> bool:
            told = client.get("/v1/queue").json()
            return bool(told["waiting"] == told["running"] == 0)

        until(free, seconds=5)
        reply = client.post("/v1/generate", json={"lesion": {"label": "benign"}})
        assert reply.status_code == 200
    until(lambda: processes.seen(pids).open_files <= before.open_files + SPARE, seconds=10)


def test_places_of_callers_who_leave_are_free_at_once() -> None:
    """Before the step that is under way has ended: only who is in the batch waits for that."""
    waiting = 40
    body = json.dumps({"lesion": {"label": "benign"}, "steps": 50}).encode()
    with running(waiting=waiting, open_requests=400) as live, live.brake.closed():
        places = waiting + 1
        lines = [_hung_on(live.url, body) for _ in range(places * 2)]
        try:
            live.brake.wait_for(1)
            until(lambda: live.client.post("/v1/generate", content=body,
                  headers={"content-type": "application/json"}).status_code == 429)  # fmt: skip
        finally:
            for line in lines:
                line.close()
        begin = time.monotonic()
        until(lambda: _gone(live) >= 1, seconds=5)
        with live.client.stream(
            "POST",
            "/v1/generate/stream",
            content=body,
            headers={"content-type": "application/json"},
        ) as reply:
            assert reply.status_code == 200
            assert next(reply.iter_lines()) == "event: queued"
        assert time.monotonic() - begin < 5
        assert live.brake.steps == 1


def _hung_on(url: str, body: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)))
    line.sendall(
        b"POST /v1/generate/stream HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    return line


def _gone(live: Any) -> float:
    return float(live.count("dermaflux_generations_total", outcome="cancelled"))
