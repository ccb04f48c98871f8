"""A process that is told to end finishes what it has begun, and answers meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from serving.draining import Work, finish_before_exit


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """What the process would do at the signal, were it not told to finish first."""
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, before)


async def turns() -> None:
    """Let everything run that can; signals come in between."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_end_waits_for_what_was_begun(ended: list[int]) -> None:
    async def process() -> None:
        work, told = Work(), []
        finish_before_exit(lambda: told.append("leaving"), work.over, seconds=30)
        with work:
            with work:
                os.kill(os.getpid(), signal.SIGTERM)
                await turns()
                assert (told, ended) == (["leaving"], [])
            await turns()
            assert ended == []
        await turns()
        assert (told, ended) == (["leaving"], [signal.SIGTERM])

    asyncio.run(process())


def test_a_second_signal_and_the_end_of_the_time_do_not_wait(ended: list[int]) -> None:
    async def process(seconds: float, signals: int) -> None:
        work = Work()
        finish_before_exit(lambda: None, work.over, seconds)
        with work:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                await turns()
            assert ended == [signal.SIGTERM]
        ended.clear()

    asyncio.run(process(seconds=30, signals=2))
    asyncio.run(process(seconds=0, signals=1))


def test_an_idle_process_ends_at_once_and_other_threads_are_left_alone(ended: list[int]) -> None:
    async def process() -> None:
        finish_before_exit(lambda: None, Work().over, seconds=30)

    thread = threading.Thread(target=lambda: asyncio.run(process()))
    thread.start()
    thread.join()

    async def idle() -> None:
        await process()
        os.kill(os.getpid(), signal.SIGTERM)
        await turns()
        assert ended == [signal.SIGTERM]

    asyncio.run(idle())
