"""One client's connection: how long it may take, and when it is closed.

uvicorn, which BentoML runs, waits for whatever a client does not do: for the rest of a head, for a
body that nobody reads, for a reply to be taken. A few thousand such connections are every file that
a process may have open. Here each of them has its time:

* a head has `HEAD_SECONDS`, from when the connection or the head's first byte is there;
* a reply that is given before the whole body has come (a refusal) says `Connection: close`. What
  still comes is thrown away for `LINGER_SECONDS`: closed at once, the client's next packet would be
  answered with a reset, which can take the reply along;
* a reader that takes nothing of a reply for `UNREAD_SECONDS` is given up, and at the process's end
  after `END_SECONDS`.

The time of a body that is read is that of whoever reads it (`serving.body`). A request that tells
its length in both ways is refused as malformed: two programs in a row may believe either, and then
disagree about where the next request begins (request smuggling, RFC 9112 section 6.1).

    uvicorn.Config(app, http=Connection)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.config import Config
    from uvicorn.server import ServerState

HEAD_SECONDS: Final = 15.0
LINGER_SECONDS: Final = 5.0
UNREAD_SECONDS: Final = 30.0
END_SECONDS: Final = 5
MAX_HEAD: Final = 16_384
"""Bytes of a head, that of h11: ours needs a twentieth."""
BOTH_LENGTHS: Final = frozenset({b"content-length", b"transfer-encoding"})
CLOSE: Final = (b"connection", b"close")


class Connection(H11Protocol):
    """uvicorn's connection, which does not wait for ever."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Strict(h11.SERVER, config.h11_max_incomplete_event_size or MAX_HEAD)
        self.app = cast(Any, self._closing(cast("ASGIApp", self.app)))
        # At its end uvicorn would wait for ever for who does not read; what was begun is finished
        # before (`serving.draining`).
        config.timeout_graceful_shutdown = config.timeout_graceful_shutdown or END_SECONDS
        self.written = 0
        self.lingering = False
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        # Else this, with what it has read, would stay until Python next collects what goes round.
        self._head = self._unread = None
        self.app = cast(Any, None)
        if self.cycle is not None:
            self.cycle.transport = self.transport

    def data_received(self, data: bytes) -> None:
        if not self.lingering:
            super().data_received(data)
            self._time_head()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            # Its task has not begun yet.
            self.cycle.transport = cast(asyncio.Transport, _Outlet(self))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_reader()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._time_reader()

    def end(self) -> None:
        """Close once the client has had time to read what was said."""
        self._time_reader()
        if not self.cycle.more_body or self.transport.is_closing():
            self.transport.close()
            return
        self.lingering = True
        # Over TLS there is no such half end; the reply's own end has to do.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._head = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _closing(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose replies end the connection where the body has not come whole."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_closing(message: Message) -> None:
                if message["type"] == "http.response.start" and self.cycle.more_body:
                    message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
                await send(message)

            await app(scope, receive, send_closing if scope["type"] == "http" else send)

        return answer

    def _time_head(self) -> None:
        waits = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if waits and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
        elif not waits and self._head is not None:
            self._head.cancel()
            self._head = None

    def _time_reader(self) -> None:
        if self._unread is None and self.transport.get_write_buffer_size() > 0:
            self._unread = self.loop.call_later(UNREAD_SECONDS, self._ask_reader, self._taken())

    def _ask_reader(self, before: int) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size() > 0 and self._taken() == before:
            self.transport.abort()
        else:
            self._time_reader()

    def _taken(self) -> int:
        """Bytes that the client's side of the line has room for, or has read."""
        return self.written - self.transport.get_write_buffer_size()


class _Outlet:
    """What a reply writes to: counts, and closes with time for the reader."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def write(self, data: bytes) -> None:
        self._line.written += len(data)
        self._line.transport.write(data)

    def is_closing(self) -> bool:
        return self._line.lingering or self._line.transport.is_closing()

    def close(self) -> None:
        self._line.end()


class _Strict(h11.Connection):
    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and {name for name, _ in event.headers} >= BOTH_LENGTHS:
            raise h11.RemoteProtocolError("two lengths of one body")
        return event
