"""Requests over HTTP as a caller of the service sends them, and whether the answer is a result.

An answer of 200 counts as one only if it holds what was asked for: a file that begins as a picture
does, a probability, a stream that ends in its image. Keys are read from a file or from
`LOAD_API_KEY`, never from the command line, which other users of a machine can read.

    >>> async with Sender("http://127.0.0.1:3000", Access(), seconds=120) as sender:
    ...     answer = await sender.send(asks.ask(0), due=time.monotonic())
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from benchmarks.answers import NO_ANSWER, OK, Answer
from benchmarks.asks import Ask
from dermaflux.errors import DermaFluxError

if TYPE_CHECKING:
    import aiohttp

KEY_VARIABLE: Final = "LOAD_API_KEY"
BUSY: Final = 429
_SIGNATURES: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"PK\x03\x04")
"""PNG, JPEG, WebP, and the zip of several."""


@dataclass(frozen=True)
class Access:
    """Keys, which callers use in turn, and what TLS needs; `ca` is trusted instead of the usual."""

    keys: tuple[str, ...] = ()
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    @classmethod
    def read(
        cls,
        key_file: Path | None,
        ca: Path | None = None,
        certificate: Path | None = None,
        private_key: Path | None = None,
    ) -> Access:
        """With the keys of a file, one a line (`#` begins a remark), else that of `LOAD_API_KEY`.

        Raises:
            DermaFluxError: the file has no key.
        """
        if key_file is None:
            given = os.environ.get(KEY_VARIABLE, "").strip()
            return cls((given,) if given else (), ca, certificate, private_key)
        lines = (line.partition("#")[0].strip() for line in key_file.read_text().splitlines())
        keys = tuple(line for line in lines if line)
        if not keys:
            raise DermaFluxError(f"{key_file} has no key; it needs one a line")
        return cls(keys, ca, certificate, private_key)

    def tls(self) -> ssl.SSLContext | bool:
        """What a connection is checked with; certificates are always checked."""
        if self.ca is None and self.certificate is None:
            return True
        context = ssl.create_default_context(cafile=self.ca)
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.private_key)
        return context

    def headers(self, caller: int) -> dict[str, str]:
        if not self.keys:
            return {}
        return {"Authorization": f"Bearer {self.keys[caller % len(self.keys)]}"}


@dataclass
class Sender:
    """Connections to one service; `seconds` is the longest that a request may take.

    With `insists`, a request that is refused for a while (429) is sent again when it may be, and
    its latency goes on counting; else the refusal is the answer.
    """

    url: str
    access: Access
    seconds: float
    insists: bool = False
    _session: aiohttp.ClientSession | None = field(default=None, init=False)

    async def __aenter__(self) -> Self:
        import aiohttp

        # No limit of connections: it would be a queue of the load generator's own, and a proxy of
        # the environment another service (aiohttp asks neither for one).
        # Idle connections are given up before the service does so (uvicorn: after 5 s), which would
        # else look like an answer lost where both happen at once.
        connector = aiohttp.TCPConnector(limit=0, ssl=self.access.tls(), keepalive_timeout=3)
        self._session = aiohttp.ClientSession(
            self.url,
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "used as a context"
        return self._session

    async def get(self, path: str, caller: int = 0) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            DermaFluxError: nobody answers.
        """
        import aiohttp

        try:
            async with (
                asyncio.timeout(self.seconds),
                self.session.get(path, headers=self.access.headers(caller)) as reply,
            ):
                return reply.status, await reply.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise DermaFluxError(
                f"{self.url}{path} does not answer ({type(error).__name__}: {error}); is the "
                "service running there?"
            ) from error

    async def send(
        self, ask: Ask, due: float, caller: int = 0, leaves_after: int | None = None
    ) -> Answer:
        """Send a request that was due at `due` (`monotonic`); what came of it.

        A stream is hung up on after so many steps (the fault is `left`), if its image is not there
        before.
        """
        import aiohttp

        sent = time.monotonic()
        retries = 0
        while True:
            seen = _Seen()
            try:
                async with asyncio.timeout_at(sent + self.seconds):
                    await self._exchange(ask, caller, seen, leaves_after)
                    if seen.status == BUSY and self.insists:
                        await asyncio.sleep(seen.retry_after or 1.0)
                        retries += 1
                        continue
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                # Also of an answer that broke off or never ended, whatever its status was. One
                # that was still refused at the end is a refusal.
                if seen.status != BUSY:
                    seen = _Seen(NO_ANSWER, type(error).__name__)
            return Answer(
                due, sent, time.monotonic(), seen.status, seen.fault, caller, retries,
                None if seen.first is None else seen.first - due, seen.retry_after,
            )  # fmt: skip

    async def _exchange(self, ask: Ask, caller: int, seen: _Seen, leaves_after: int | None) -> None:
        headers = {**self.access.headers(caller), "Content-Type": ask.content_type}
        async with self.session.post(ask.path, data=ask.body, headers=headers) as reply:
            if reply.status == OK and ask.kind == "stream":
                seen.fault = await self._streamed(reply, seen, leaves_after)
            else:
                body = await reply.read()
                seen.fault = fault(ask, reply.status, body)
            seen.status = reply.status
            wait = reply.headers.get("Retry-After", "")
            if seen.status == BUSY and wait.isdecimal():
                seen.retry_after = float(wait)

    async def _streamed(
        self, reply: aiohttp.ClientResponse, seen: _Seen, leaves_after: int | None
    ) -> str:
        images = 0
        async for name, data in events(reply.content.iter_any()):
            if "error" in data:
                return str(dict(data["error"]).get("code", "error"))
            images += name == "image"
            if name == "progress":
                seen.first = seen.first or time.monotonic()
                # One who reads slowly is told of the newest step alone.
                if leaves_after is not None and int(data.get("step", 0)) >= leaves_after:
                    reply.close()
                    return "left"
        return "" if images else "no_image"


@dataclass
class _Seen:
    """An answer while it comes."""

    status: int = NO_ANSWER
    fault: str = ""
    first: float | None = None
    retry_after: float | None = None


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-sent events, name and JSON data, as they come; comments are passed over.

    Data that is no JSON object is the event `error` with the code `no_json`. Lines are joined here,
    since aiohttp's own have a longest one, which an image passes.
    """
    pending = bytearray()
    async for chunk in chunks:
        pending += chunk
        if b"\n\n" not in chunk and b"\n\n" not in pending[-len(chunk) - 1 :]:
            continue
        *blocks, rest = bytes(pending).split(b"\n\n")
        pending = bytearray(rest)
        for block in blocks:
            lines = [line.partition(b":") for line in block.split(b"\n")]
            name = b"".join(value for field, _, value in lines if field == b"event").strip()
            data = b"".join(value for field, _, value in lines if field == b"data")
            if name:
                yield name.decode("utf-8", "replace"), _object(data)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"error": {"code": "no_json"}}


def fault(ask: Ask, status: int, body: bytes) -> str:
    """The error's code of our form, or why an answer of 200 is no result; empty where it is one."""
    if status == OK and ask.kind == "generate":
        return "" if body.startswith(_SIGNATURES) else "no_image"
    try:
        told = json.loads(body)
    except ValueError:
        return "no_json"
    if status == OK:
        # A picture that the gate refuses has no probability, but a decision.
        return "" if isinstance(told, dict) and "decision" in told else "no_decision"
    error = told.get("error") if isinstance(told, dict) else None
    return str(error["code"]) if isinstance(error, dict) and "code" in error else "no_code"
