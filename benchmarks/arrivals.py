"""When requests are sent: by callers who wait for their answer, or at times fixed beforehand.

A closed loop of n callers says what the service can do with n under way. An open loop says what a
caller waits while requests come at a rate, whether the service keeps up or not: its times are drawn
before it begins, and nothing that the service does moves them.

    >>> poisson(rate=2.0, seconds=3.0, seed=0)
    [0.3399657, 0.8477779, 0.8573848, ...]
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.answers import Answer

Send = Callable[[int, float, int], Awaitable[Answer]]
"""Sends the request of a number, due at a moment (`monotonic`), of a caller."""


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments in [0, seconds) of a Poisson process of `rate` a second, ascending.

    Between them lie exponential times of mean 1 / rate, as between callers who know nothing of each
    other; the same seed gives the same moments.
    """
    random = np.random.default_rng(seed)
    moments: list[float] = []
    now = float(random.exponential(1 / rate))
    while now < seconds:
        moments.append(now)
        now += float(random.exponential(1 / rate))
    return moments


async def opened(send: Send, moments: Sequence[float], callers: int = 1) -> list[Answer]:
    """Send one request at each moment, counted from now, the callers in turn; all the answers.

    However late one is answered, the next is sent at its moment.
    """
    begin = time.monotonic()
    under_way: list[asyncio.Task[Answer]] = []
    async with asyncio.TaskGroup() as group:
        for number, moment in enumerate(moments):
            due = begin + moment
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            under_way.append(group.create_task(_sent(send(number, due, number % callers))))
    return [task.result() for task in under_way]


async def closed(send: Send, callers: int, seconds: float) -> list[Answer]:
    """`callers` who each send the next request when they have their answer, for `seconds`.

    One who was told to come back later does, with the next one; what is under way at the end is
    waited for. A request is due when it is sent: a caller who waits asks for nothing.
    """
    end = time.monotonic() + seconds
    numbers = itertools.count()

    async def ask(caller: int) -> list[Answer]:
        answers: list[Answer] = []
        while (now := time.monotonic()) < end:
            answers.append(await send(next(numbers), now, caller))
            if (pause := answers[-1].retry_after) is not None:
                await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))
        return answers

    found = await asyncio.gather(*(ask(caller) for caller in range(callers)))
    return [answer for answers in found for answer in answers]


async def _sent(answer: Awaitable[Any]) -> Any:
    return await answer
