"""What a client's connection is given: time for a head, an end that can be read, and no more."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import uvicorn

from serving import connections
from tests.serving.live import until

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LARGE = 40_000_000
"""Bytes that no buffer of the system takes whole."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body at /read; answers with much at /large."""
    if scope["path"] == "/read":
        while (await receive()).get("more_body"):
            pass
    body = bytes(LARGE) if scope["path"] == "/large" else b"well"
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[uvicorn.Server]:
    """uvicorn with our connections, on a free port."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    config = uvicorn.Config(
        app, port=0, log_level="error", lifespan="off", http=connections.Connection, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def dialled(server: uvicorn.Server) -> socket.socket:
    way = socket.create_connection(server.servers[0].sockets[0].getsockname())
    way.settimeout(10)
    return way


def all_of(way: socket.socket) -> bytes:
    """What comes until the other side ends."""
    found = b""
    while chunk := way.recv(65_536):
        found += chunk
    return found


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_a_head_that_does_not_come_is_not_waited_for(server: uvicorn.Server, begun: bytes) -> None:
    with dialled(server) as way:
        way.sendall(begun)
        assert all_of(way) == b""


def dripped(way: socket.socket, data: bytes) -> None:
    """Send it again and again, until the other side does not take it any more."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        way.sendall(data)
        threading.Event().wait(0.02)


def test_a_head_that_comes_byte_by_byte_has_no_more_time(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        with pytest.raises(OSError, match="reset|pipe"):
            dripped(way, b"a")


def test_the_head_of_a_second_request_has_its_own_time(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
        assert all_of(way).count(b"HTTP/1.1 200") == 1


def test_a_request_that_takes_longer_than_a_head_may_is_answered(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\na")
        threading.Event().wait(0.6)
        way.sendall(b"bcd")
        assert way.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/", "/read"])
def test_two_lengths_of_one_body_are_refused(server: uvicorn.Server, path: str) -> None:
    """Request smuggling: whoever stands before us may have taken the rest for the body."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n"
    with dialled(server) as way:
        way.sendall(head.encode() + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")
        reply = all_of(way)
    assert reply.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in reply.lower()
    assert reply.count(b"HTTP/1.1") == 1


def test_a_reply_before_the_body_ends_the_connection(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
        reply = all_of(way)
        assert b"connection: close" in reply.lower()
        assert reply.endswith(b"well")
        # What is still on its way does not reset the line; and then it is closed, whoever goes on.
        way.sendall(b"a" * 100_000)
        with pytest.raises(OSError, match="reset|pipe"):
            dripped(way, b"a" * 1000)


def test_a_body_that_came_whole_leaves_the_connection_open(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        for path in (b"/", b"/read"):
            way.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            reply = way.recv(1000)
            while not reply.endswith(b"well"):
                reply += way.recv(1000)
            assert b"connection: close" not in reply.lower()


def test_a_reader_that_takes_nothing_is_given_up(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        # One piece, so that it has begun; a look at the connections could miss them.
        assert way.recv(1000)
        until(lambda: not server.server_state.connections)
        assert not server.server_state.tasks


def test_a_slow_reader_gets_all(server: uvicorn.Server) -> None:
    with dialled(server) as way:
        way.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        begin, found = time.monotonic(), 0
        while chunk := way.recv(2_000_000):
            found += len(chunk)
            if time.monotonic() - begin < 1.2:
                threading.Event().wait(0.05)
        assert found > LARGE


def test_an_end_does_not_wait_for_who_does_not_read(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 60.0)
    monkeypatch.setattr(connections, "END_SECONDS", 1)
    with dialled(server) as way:
        way.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(server.server_state.tasks) == 1)
        server.should_exit = True
        begin = time.monotonic()
        until(lambda: not server.server_state.tasks, seconds=30)
        assert time.monotonic() - begin < 10


def test_a_connection_that_is_over_is_freed_at_once(server: uvicorn.Server) -> None:
    gc.collect()
    gc.disable()
    try:
        with dialled(server) as way:
            way.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\nabc")
            assert all_of(way).endswith(b"well")
            (line,) = server.server_state.connections
            over = weakref.ref(line)
            del line
        until(lambda: not server.server_state.connections)
        until(lambda: over() is None)
    finally:
        gc.enable()
