"""The classifier of another process: photographs of many callers put together, its life followed.

Whoever comes while nothing is under way is sent at once; meanwhile photographs gather, and as soon
as the last call is back those that wait go together, a batch at most. So nobody waits for a batch
to fill, and batches are as large as there is work. A full batch is sent while another is being
scored: its files are read by then. BentoML would make batches in the other process: that is a call
between the processes for each photograph, a look every millisecond whether the engine is free, and
at times a wait for others that never come.

Who leaves before the call that he is in has ended takes nothing along: the other process scores all
of a call whoever is left, so its place is taken until it is back. If it were not, people who ask
and leave at once would fill that process with work that nobody waits for, in calls of one.

A process can die with photographs in it, of lack of memory say. `Remote` holds one connection open
for as long as the other process lives (`follow`): when that breaks, everybody who waits is told at
once, and whoever comes meanwhile too; generation goes on. Nothing is asked again and again.

    >>> remote = Remote(client, lost=(ConnectionError,))
    >>> following = asyncio.create_task(remote.follow())
    >>> await remote.score(Photograph(data=content))
    Result(answer=Answer(label='benign', ...), fault=None, ...)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from serving.scores import LOADING, READY, Trouble, UnavailableError
from serving.scoring import BATCH, Photograph, Result

logger = logging.getLogger(__name__)

CALLS: Final = 2
"""Calls under way at a time: one that is scored, and a full batch behind it that is read."""
ATTEMPTS: Final = 3
"""A connection that the other side closes as idle just when it is used again is no failure."""
LEFT_SECONDS: Final = 30.0
"""For which a call that everybody has left keeps its place at most: it may never come back."""
AGAIN_SECONDS: Final = 0.5
"""Before a process that could not be followed is looked for again."""

ENDED: Final = Trouble("The classifier's process ended and is being started again.")


class Client(Protocol):
    """What BentoML's client makes of `serving.scorer.Scorer`."""

    async def score(self, photographs: Sequence[Photograph]) -> list[Result]: ...

    def life(self) -> AsyncIterator[str]: ...


@dataclass(eq=False)
class _Asked:
    """A photograph whose caller waits; `call` is the one that it is in, once it is sent."""

    photograph: Photograph
    answer: asyncio.Future[Result]
    call: _Call | None = None


@dataclass(eq=False)
class _Call:
    """Photographs on their way together."""

    asked: list[_Asked]
    task: asyncio.Task[None] | None = field(default=None, init=False)

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(one.answer.done() for one in self.asked)


class Remote:
    """The classifier of another process; `lost` are the client's exceptions that mean that a
    connection broke. `follow` has to run beside it."""

    def __init__(self, client: Client, lost: tuple[type[Exception], ...]) -> None:
        self._client = client
        self._lost = lost
        self._waiting: deque[_Asked] = deque()
        self._calls: set[_Call] = set()
        self._batch = BATCH
        self._note = ""
        self._trouble: Trouble | None = Trouble("The classifier is being loaded.")
        self._gone = asyncio.Event()

    def trouble(self) -> Trouble | None:
        return self._trouble

    def note(self) -> str:
        return self._note

    async def follow(self) -> None:
        """Keep to what the other process says of itself, for as long as both live.

        A connection waits in the socket until there is a process that takes it, so this does too.
        """
        while True:
            try:
                said = ""
                async for piece in self._client.life():
                    # Pieces are what one read of a socket gives: no line or many, or half of one.
                    whole, end, said = (said + piece).rpartition("\n")
                    if end:
                        self._told(whole)
                logger.info("the classifier's process ends")
            except self._lost as error:
                logger.warning("the classifier's process is gone: %r", error)
            self._trouble = ENDED
            self._gone.set()
            await asyncio.sleep(AGAIN_SECONDS)

    async def score(self, photograph: Photograph) -> Result:
        if self._trouble is not None:
            raise UnavailableError(self._trouble)
        asked = _Asked(photograph, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._send()
        try:
            return await asked.answer
        finally:
            self._left(asked)

    def _send(self) -> None:
        """Send who waits, if there is reason to; see the module."""
        while self._waiting and len(self._calls) < CALLS:
            if self._calls and len(self._waiting) < self._batch:
                return
            count = min(self._batch, len(self._waiting))
            call = _Call([self._waiting.popleft() for _ in range(count)])
            for one in call.asked:
                one.call = call
            self._calls.add(call)
            call.task = asyncio.create_task(self._sent(call.asked))
            call.task.add_done_callback(partial(self._back, call))

    def _left(self, asked: _Asked) -> None:
        """Its caller has an answer, or has gone: nothing is begun for who has gone."""
        if asked.call is None:
            with contextlib.suppress(ValueError):
                self._waiting.remove(asked)
        elif (task := asked.call.task) is not None and asked.answer.cancelled() and asked.call.left:
            # The task alone: the timer must not keep the files.
            asyncio.get_running_loop().call_later(LEFT_SECONDS, task.cancel)

    def _back(self, call: _Call, task: asyncio.Task[None]) -> None:
        """A call has ended, well or not: whoever it gave nothing is told why."""
        self._calls.discard(call)
        error = None if task.cancelled() else task.exception()
        for one in call.asked:
            # Else the two would keep each other, with the files, until Python next looks for such.
            one.call = None
            if one.answer.done():
                continue
            if error is None:
                one.answer.cancel()
            else:
                one.answer.set_exception(error)
        self._send()

    async def _sent(self, some: Sequence[_Asked]) -> None:
        photographs = [one.photograph for one in some]
        for attempt in range(ATTEMPTS):
            if self._trouble is not None:
                raise UnavailableError(self._trouble)
            try:
                results = await self._once(photographs)
            except self._lost as error:
                logger.info("attempt %d: a connection was lost: %r", attempt + 1, error)
                continue
            for one, result in zip(some, results, strict=True):
                if not one.answer.done():
                    one.answer.set_result(result)
            return
        raise UnavailableError(Trouble("The classifier's process cannot be reached."))

    async def _once(self, photographs: Sequence[Photograph]) -> list[Result]:
        """One call, given up as soon as the other process is gone."""
        call = asyncio.ensure_future(self._client.score(photographs))
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({call, gone}, return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                return call.result()
            raise UnavailableError(self._trouble or ENDED)
        finally:
            gone.cancel()
            call.cancel()

    def _told(self, text: str) -> None:
        """The last of the lines that came together is how it stands."""
        line = text.splitlines()[-1]
        word, _, more = line.partition(" ")
        if word == READY:
            batch, _, self._note = more.partition(" ")
            self._trouble = None
            self._batch = int(batch) if batch.isdecimal() else BATCH
            # A new event, since those who waited for the last one may not all have seen it yet.
            self._gone = asyncio.Event()
        elif line == LOADING:
            self._trouble = Trouble("The classifier is being loaded.")
        else:
            self._trouble = Trouble(line, passes=False)
