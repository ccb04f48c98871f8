"""The turns of the sides: each is started, asked by callers, and ended.

>>> rounds = Rounds(settings, [1, 4, 16], families, kinds(settings, bundle), files, folder)
>>> asyncio.run(rounds.turn("litserve", 0))       # tries all of its settings
>>> rounds.found["litserve"].rates
[5.1]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.answers import Answer, Window, percentiles, summary
from benchmarks.arrivals import closed, opened, poisson
from benchmarks.asks import Classifications
from benchmarks.http_ours import Kind
from benchmarks.http_sides import Running, Side, settle, started, watched
from benchmarks.sending import Access, Sender
from dermaflux.errors import DermaFluxError

SAMPLE: Final = 8
"""Photographs whose answers are compared."""
_TIMEOUT: Final = 120.0


class Plan(Protocol):
    """What is needed of the command's settings."""

    @property
    def images(self) -> Path | None: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def few_seconds(self) -> float: ...
    @property
    def open_seconds(self) -> float: ...
    @property
    def warm_up(self) -> float: ...
    @property
    def port(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


@dataclass
class Found:
    """What was seen of a family over the rounds; `rates` are images a second at most callers."""

    side: Side
    tried: dict[str, float] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    closed: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    open: dict[str, Any] | None = None
    start_s: list[float] = field(default_factory=list)
    cpu_s_per_1000: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0
    answers: list[Mapping[str, Any]] = field(default_factory=list)


class Rounds:
    """Gathers `found` by family, and `alone` by kind of ours: what `benchmarks.classify_rate` said
    each round."""

    def __init__(
        self,
        plan: Plan,
        counts: Sequence[int],
        families: Mapping[str, Sequence[Side]],
        ours: Sequence[Kind],
        files: Sequence[tuple[bytes, str]],
        folder: Path,
    ) -> None:
        self.found: dict[str, Found] = {}
        self.alone: dict[str, list[dict[str, Any]]] = {one.alone: [] for one in ours}
        self._plan = plan
        self._counts = counts
        self._families = families
        self._ours = {one.alone: one for one in ours}
        self._asks = Classifications(files)
        self._folder = folder

    @property
    def names(self) -> list[str]:
        """All that take turns."""
        return [*self._ours, *self._families]

    async def turn(self, name: str, number: int) -> None:
        """The turn of one of `names` in a round, counted from 0.

        Raises:
            DermaFluxError: it cannot be started, or gave no result.
        """
        if name in self._ours:
            self.alone[name].append(self._in_process(self._ours[name]))
            rate = self.alone[name][-1]["decoded_per_s"]
            print(f"round {number + 1}, {name}: {rate:.2f} images/s", file=sys.stderr)
            return
        if number == 0:
            seen = [Found(side) for side in self._families[name]]
            for one in seen:
                await self._measure(one, number)
            best = max(seen, key=lambda one: one.rates[0])
            best.tried = {one.side.name: one.rates[0] for one in seen}
            self.found[name] = best
        else:
            await self._measure(self.found[name], number)

    async def _measure(self, seen: Found, number: int) -> None:
        plan, last = self._plan, number == self._plan.rounds - 1
        log = self._folder / "log"
        with started(seen.side, log, plan.port) as running, watched(running):
            settle(running)
            async with Sender(running.url, Access(), _TIMEOUT) as sender:
                # In the last round, so that of several settings only the best takes the time.
                few = self._counts[:-1] if last and plan.few_seconds else ()
                for callers in few:
                    await self._closed(seen, sender, running, callers, plan.few_seconds)
                await self._closed(seen, sender, running, self._counts[-1], plan.seconds)
                if number == 0:
                    seen.answers = await self._answers(sender)
                if last and plan.open_seconds:
                    seen.open = await self._open(sender, sorted(seen.rates)[len(seen.rates) // 2])
        seen.start_s.append(round(running.start_s, 2))
        seen.peak_rss_bytes = max(seen.peak_rss_bytes, running.peak_rss_bytes)
        rate = seen.rates[-1]
        print(f"round {number + 1}, {seen.side.name}: {rate:.2f} images/s", file=sys.stderr)

    async def _closed(
        self, seen: Found, sender: Sender, running: Running, callers: int, seconds: float
    ) -> None:
        async def send(number: int, due: float, caller: int) -> Answer:
            return await sender.send(self._asks.ask(number), due, caller)

        cpu, begin = running.cpu_s(), time.monotonic()
        answers = await closed(send, callers, self._plan.warm_up + seconds)
        cpu = running.cpu_s() - cpu
        window = Window(begin + self._plan.warm_up, begin + self._plan.warm_up + seconds)
        # Where callers still wait for their first answer when the window ends, none is due in it.
        counted = [one for one in answers if window.holds(one.due)] or answers
        good = sum(one.good for one in answers)
        if not any(one.good for one in counted):
            told = summary(answers, Window(begin, window.end), None)
            raise DermaFluxError(
                f"{seen.side.name} gave no result: statuses {told['statuses']}, faults "
                f"{told['faults']}"
            )
        rate = rate_of(counted)
        seen.closed.setdefault(callers, []).append(
            {
                "images_per_s": round(rate, 4),
                "results": sum(one.good for one in counted),
                "failed": sum(not one.good for one in counted),
                "latency_ms": percentiles([1e3 * one.seconds for one in counted if one.good]),
            }
        )
        if callers == self._counts[-1]:
            seen.rates.append(rate)
            seen.cpu_s_per_1000.append(round(1e3 * cpu / good, 2))

    async def _open(self, sender: Sender, rate: float) -> dict[str, Any]:
        async def send(number: int, due: float, caller: int) -> Answer:
            return await sender.send(self._asks.ask(number), due, caller)

        plan, half = self._plan, rate / 2
        whole = plan.warm_up + plan.open_seconds
        begin = time.monotonic()
        answers = await opened(send, poisson(half, whole, plan.seed))
        told = summary(answers, Window(begin + plan.warm_up, begin + whole), None)
        kept = ("requests", "results", "faults", "latency_ms", "sent_late_ms")
        return {"rate_per_s": round(half, 4), **{name: told[name] for name in kept}}

    async def _answers(self, sender: Sender) -> list[Mapping[str, Any]]:
        found = []
        for number in range(SAMPLE):
            ask = self._asks.ask(number)
            headers = {"Content-Type": ask.content_type}
            async with sender.session.post(ask.path, data=ask.body, headers=headers) as reply:
                found.append(json.loads(await reply.read()))
        return found

    def _in_process(self, kind: Kind) -> dict[str, Any]:
        plan = self._plan
        given = {
            "--images": plan.images, "--seconds": plan.seconds / 2, "--warm-up": plan.warm_up / 2,
            "--seed": plan.seed,
        }  # fmt: skip
        words = [
            w for name, value in given.items() if value is not None for w in (name, str(value))
        ]
        command = [sys.executable, "-m", "benchmarks.classify_rate", *kind.words(), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DermaFluxError(
                f"the classifier in process failed:\n{done.stderr[-1500:].strip()}"
            )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


def rate_of(answers: Sequence[Answer]) -> float:
    """Results a second of a closed loop: each caller's over its whole requests, added up.

    Counting what ends within a window would be off by a batch at either edge.
    """
    rates = []
    for caller in {one.caller for one in answers}:
        own = [one for one in answers if one.caller == caller]
        spent = max(one.ended for one in own) - min(one.due for one in own)
        rates.append(sum(one.good for one in own) / spent)
    return sum(rates)
