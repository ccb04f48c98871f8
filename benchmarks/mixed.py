"""Callers of every kind at once, as a service meets them that is left alone for a day.

They draw pictures, follow streams, leave some of them half way and others at once, classify
photographs, and send what is none. What each kind may get stands beside it, so whoever reads the
counts can tell what should not have been.

    >>> mixed = Mixed(sender, callers=16, steps=4, seed=0)
    >>> await mixed.come(seconds=300)
    >>> mixed.outcomes["stream", "200"]
    1309
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any, Final

import numpy as np

from benchmarks import asks, scrape
from benchmarks.load import metrics
from benchmarks.sending import Sender

MIX: Final = {"generate": 6, "leave": 2, "stream": 3, "leave_stream": 3, "classify": 5, "bad": 3}
"""How often each is done, relative to the others."""
_RESULTS: Final = frozenset({"200", "429 busy", "504 deadline", "200 deadline"})
"""A stream whose deadline passes has sent its 200 before, and says so in itself."""
EXPECTED: Final = {
    "generate": _RESULTS,
    "stream": _RESULTS,
    "classify": _RESULTS,
    "leave": _RESULTS | {"left"},
    "leave_stream": _RESULTS | {"200 left"},
    "bad": {"refused", "429 busy"},
}
BAD: Final = (
    asks.Ask("classify", b"no picture", "image/png"),
    asks.Ask("classify", b"\x89PNG\r\n\x1a\n" + b"\0" * 4000, "image/png"),
    asks.Ask("classify", b"", "image/jpeg"),
    asks.Ask("classify", b"GIF89a", "image/gif"),
    asks.Ask("classify", b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
    asks.Ask("generate", b'{"lesion": {"label": "bening"}}', "application/json"),
    asks.Ask("generate", b'{"steps": ' + b"[" * 5000, "application/json"),
    asks.Ask("generate", b'{"lesion": {"label": "benign"}, "seed": -1}', "application/json"),
)
"""What has to be refused with a 4xx that says why."""
_MOST_PAUSE: Final = 1.0
"""Seconds that a refused caller keeps away at most: the queue is to stay full."""
_PATIENCE: Final = 0.3
"""Seconds after which a caller who leaves has left."""
_PHOTOGRAPHS: Final = 6
_SETTLES: Final = 15.0


class Mixed:
    """Callers of one service; `outcomes` counts by kind and by status and code."""

    def __init__(self, sender: Sender, callers: int, steps: int, seed: int) -> None:
        self._sender = sender
        self._callers = callers
        self._steps = steps
        self._seed = seed
        self._draws = asks.Generations("generate", seed, (steps,))
        self._streams = asks.Generations("stream", seed, (steps,))
        self._photographs = asks.Classifications(asks.drawn(_PHOTOGRAPHS, seed))
        self.outcomes: Counter[tuple[str, str]] = Counter()

    async def once(self) -> None:
        """Each kind once, so that what a service makes at the first of each is made."""
        for kind in MIX:
            await self._ask(kind, 0, np.random.default_rng(0))

    async def come(self, seconds: float) -> None:
        """All of them, each with the next request when the last one is answered."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._caller(number, end) for number in range(self._callers)))

    async def settled(self) -> dict[str, Any]:
        """Once they have gone: what still waits or runs, and whether a picture is drawn then."""
        end = time.monotonic() + _SETTLES
        while any((busy := await self._busy()).values()) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        answer = await self._sender.send(self._draws.ask(0), time.monotonic())
        return {"busy": busy, "then_drawn": answer.good}

    def unexpected(self) -> dict[str, int]:
        """What came that should not have."""
        return {
            f"{kind}: {outcome}": count
            for (kind, outcome), count in sorted(self.outcomes.items())
            if outcome not in EXPECTED[kind]
        }

    async def _caller(self, caller: int, end: float) -> None:
        random = np.random.default_rng((self._seed, caller))
        shares = np.array([*MIX.values()]) / sum(MIX.values())
        while time.monotonic() < end:
            pause = await self._ask(str(random.choice([*MIX], p=shares)), caller, random)
            if pause:
                await asyncio.sleep(min(pause, _MOST_PAUSE))

    async def _ask(self, kind: str, caller: int, random: np.random.Generator) -> float:
        """Ask once and count what came of it; seconds to keep away."""
        number = int(random.integers(2**31))
        match kind:
            case "bad":
                question = BAD[number % len(BAD)]
            case "classify":
                question = self._photographs.ask(number)
            case "stream" | "leave_stream":
                question = self._streams.ask(number)
            case _:
                question = self._draws.ask(number)
        half = max(1, self._steps // 2) if kind == "leave_stream" else None
        patience = float(random.uniform(0, _PATIENCE)) if kind == "leave" else None
        try:
            async with asyncio.timeout(patience):
                answer = await self._sender.send(question, time.monotonic(), caller, half)
        except TimeoutError:
            self.outcomes[kind, "left"] += 1
            return 0.0
        outcome = f"{answer.status} {answer.fault}".strip()
        if kind == "bad" and 400 <= answer.status < 429 and not answer.fault.startswith("no_"):
            outcome = "refused"
        self.outcomes[kind, outcome] += 1
        return answer.retry_after or 0.0

    async def _busy(self) -> dict[str, float]:
        """Requests that wait or run: of the queue where it tells, else of the gauges."""
        status, body = await self._sender.get("/v1/queue")
        if status == 200:
            told = json.loads(body)
            return {name: float(told[name]) for name in ("waiting", "running")}
        gauges = scrape.gauges(await metrics(self._sender))
        return {
            name: value for name, value in gauges.items() if "waiting" in name or "running" in name
        }
