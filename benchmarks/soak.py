"""Mixed load for minutes, and whether the service is at its end what it was at its beginning.

    python -m benchmarks.soak http://127.0.0.1:3000 --minutes 5
    python -m benchmarks.soak http://127.0.0.1:3000 --minutes 60 --callers 32 --out soak.json

Callers of every kind come (`benchmarks.mixed`), more of them than the queue has places, so that
many are told to come back. Meanwhile memory, open files and threads of the service's processes are
read from /proc, and its probes are timed. It passes (else the exit status is 1) where

- every answer is one that was to be: a result, a refusal (429), a deadline (504), or of what was
  no photograph the error that says so; no connection broke;
- memory does not grow: after the warm-up, its slope (`benchmarks.slope`) is under `--bound` or not
  to be told from none. Minutes stand for a day through that slope alone, so its interval stands
  beside it: a run whose interval reaches beyond the bound is too short, and says so. A service that
  has just started grows for some minutes (engines prepare each size of batch at its first use):
  soak it twice, or for long, or with more `--warm-up`;
- once the callers have gone, files are closed, nobody waits or runs, and a picture is drawn;
- the probes answered, 99 of a hundred within `--probe-ms`; the slowest stands beside them.

Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks import processes
from benchmarks.answers import percentiles
from benchmarks.load import told
from benchmarks.machine import environment
from benchmarks.mixed import MIX, Mixed
from benchmarks.sending import Access, Sender
from benchmarks.slope import floors, growth
from dermaflux import files
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.errors import DermaFluxError

GROWN: Final = 1
"""Exit status where the service did not pass."""
HOUR: Final = 3600.0
MB: Final = 1e6
_MARGIN: Final = 10
"""Files that may be open more than before: a pool that grew, a log that was opened."""
_SETTLES: Final = 15.0
_TELLS: Final = 30.0
"""Seconds between two lines of progress, and until files have to be closed."""


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.soak`."""

    url: str = option("address of the service on this machine, as http://127.0.0.1:3000")
    minutes: float = option("how long callers come", 5.0)
    callers: int = option("callers at once", 16)
    steps: int = option("of each picture", 4)
    warm_up: float = option("share of the time that does not count for the slope", 0.25)
    every: float = option("seconds between two readings", 0.25)
    bound: float = option("MB an hour that memory may grow by", 30.0)
    probe_ms: float = option("longest that 99 of a hundred probes may take", 500.0)
    timeout: float = option("longest time that a request may take, in seconds", 180.0)
    pid: int | None = option("first process of the service, if not found by its port", None)
    seed: int = option("of what is asked", 0)
    key_file: Path | None = option(
        "file of API keys, one a line, used in turn; without it LOAD_API_KEY is the key", None
    )
    ca: Path | None = option("certificate of who signed the service's, PEM", None)
    client_cert: Path | None = option("our certificate, PEM, where the service wants one", None)
    client_key: Path | None = option("its private key, PEM, if not in the same file", None)
    out: Path | None = option("write the result there too", None)


@dataclass
class Watch:
    """Readings of a service's processes and probes, one every `every` seconds."""

    sender: Sender
    roots: Sequence[int]
    every: float
    seconds: list[float] = field(default_factory=list)
    readings: list[processes.Seen] = field(default_factory=list)
    probes_ms: list[float] = field(default_factory=list)
    silent: int = 0

    def now(self) -> processes.Seen:
        return processes.seen(processes.family(self.roots))

    async def go_on(self, mixed: Mixed) -> None:
        """Read and probe until cancelled, and tell of it now and then."""
        begin = time.monotonic()
        telling = begin + _TELLS
        while True:
            seen = self.now()
            self.seconds.append(time.monotonic() - begin)
            self.readings.append(seen)
            for path in ("/livez", "/readyz"):
                await self._probe(path)
            if time.monotonic() > telling:
                telling += _TELLS
                print(
                    f"{self.seconds[-1] / 60:.1f} minutes: {mixed.outcomes.total()} requests, "
                    f"{seen.rss_bytes / MB:.0f} MB, {seen.open_files} files, "
                    f"{seen.threads} threads",
                    file=sys.stderr,
                )
            await asyncio.sleep(self.every)

    async def _probe(self, path: str) -> None:
        begin = time.monotonic()
        try:
            status, _ = await self.sender.get(path)
        except DermaFluxError:
            status = 0
        self.silent += status != 200
        self.probes_ms.append(1e3 * (time.monotonic() - begin))


def memory(
    seconds: Sequence[float], readings: Sequence[float], requests_an_hour: float, bound: float
) -> dict[str, Any]:
    """The slope of readings in bytes, in MB an hour, beside its bound.

    Raises:
        DermaFluxError: too few readings.
    """
    if len(readings) < 3:
        raise DermaFluxError(
            f"{len(readings)} readings are too few for a slope; use more --minutes"
        )
    x, y = floors(seconds, [value / MB for value in readings])
    found = growth(x, y).times(HOUR)
    return {
        "begin_mb": round(y[0], 1),
        "end_mb": round(y[-1], 1),
        "most_mb": round(max(readings) / MB, 1),
        "mb_an_hour": {name: round(value, 2) for name, value in asdict(found).items()},
        "bound_mb_an_hour": bound,
        "bytes_a_request": round(found.slope * MB / requests_an_hour, 1),
        "passed": found.slope <= bound or found.low <= 0,
        "long_enough": found.high <= bound or found.low > bound,
    }


async def soaked(settings: Settings) -> dict[str, Any]:
    """One run and its figures; under `passed`, what each was held against.

    Raises:
        DermaFluxError: nobody answers, its processes are not seen, or it was too short.
    """
    access = Access.read(settings.key_file, settings.ca, settings.client_cert, settings.client_key)
    address = urlsplit(settings.url)
    port = address.port or {"http": 80, "https": 443}.get(address.scheme, 80)
    async with Sender(settings.url, access, settings.timeout) as sender:
        service = await told(sender)
        roots = processes.listening(port) if settings.pid is None else [settings.pid]
        mixed = Mixed(sender, settings.callers, settings.steps, settings.seed)
        await mixed.once()
        watch = Watch(sender, roots, settings.every)
        before = watch.now()
        watching = asyncio.create_task(watch.go_on(mixed))
        await mixed.come(60 * settings.minutes)
        watching.cancel()
        slots = await mixed.settled()
    # Our connections are closed now; the service's ends of them are a moment later.
    end = time.monotonic() + _SETTLES
    while (after := watch.now()).open_files > before.open_files and time.monotonic() < end:
        time.sleep(0.2)
    first = int(len(watch.readings) * settings.warm_up)
    total = mixed.outcomes.total()
    grown = memory(
        watch.seconds[first:],
        [one.rss_bytes for one in watch.readings[first:]],
        total / settings.minutes * 60,
        settings.bound,
    )
    probes = percentiles(watch.probes_ms) or {"p99": math.inf}
    unexpected = mixed.unexpected()
    return {
        "service": service,
        "requests": total,
        "outcomes": {
            kind: {name: n for (one, name), n in sorted(mixed.outcomes.items()) if one == kind}
            for kind in MIX
        },
        "unexpected": unexpected,
        "memory": grown,
        "probes_ms": probes,
        "probes_without_200": watch.silent,
        "before": asdict(before),
        "after": asdict(after),
        "slots": slots,
        "passed": {
            "answers": not unexpected and total > 0,
            "memory": grown["passed"],
            "files": after.open_files <= before.open_files + _MARGIN,
            "slots": slots["then_drawn"] and not any(slots["busy"].values()),
            "probes": not watch.silent and probes["p99"] <= settings.probe_ms,
        },
    }


def failures(passed: Mapping[str, bool]) -> list[str]:
    """What did not pass."""
    return sorted(name for name, well in passed.items() if not well)


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    settings = parsed(Settings, "python -m benchmarks.soak", __doc__.split("\n\n")[0], arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """Soak, and print the result as one line of JSON; the exit status.

    Raises:
        DermaFluxError: a setting is out of range, or the service cannot be watched.
    """
    least = {
        "minutes": 0.01, "callers": 1, "steps": 1, "warm_up": 0, "every": 0.01, "bound": 0,
        "probe_ms": 1, "timeout": 1,
    }  # fmt: skip
    at_least(settings, least)
    if settings.warm_up > 0.9:
        raise DermaFluxError(f"--warm-up {settings.warm_up} is a share; use 0 to 0.9")
    figures = asyncio.run(soaked(settings))
    failed = failures(figures["passed"])
    if failed:
        print(f"did not pass: {', '.join(failed)}", file=sys.stderr)
    if not figures["memory"]["long_enough"]:
        print("too short to tell such a slope from noise; use more --minutes", file=sys.stderr)
    result = {
        "benchmark": "soak",
        "command": " ".join(["python -m benchmarks.soak", *words]),
        "environment": environment(),
        "minutes": settings.minutes,
        "callers": settings.callers,
        "steps": settings.steps,
        "seed": settings.seed,
        **figures,
    }
    if settings.out is not None:
        files.write(settings.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result))
    return GROWN if failed else 0


if __name__ == "__main__":
    sys.exit(main())
