"""The service under load, over HTTP: what callers wait, what they get, and where it ends.

    python -m benchmarks.load http://127.0.0.1:3000 --concurrency 1,2,4,8
    python -m benchmarks.load http://127.0.0.1:3000 --rate 1,2,3 --steps 4,20 --slo-ms 5000
    python -m benchmarks.load https://dermaflux.clinic --work classify --rate 10 --ca ca.pem \\
        --key-file keys.txt --slo-ms 500 --fail-under 0.99

`--concurrency` is a closed loop, one level after the other: so many callers, each of whom sends the
next request when they have their answer. `--rate` is an open loop of Poisson arrivals, drawn before
it begins; latency counts from the moment that was drawn, so a service that stalls is not excused
(see `benchmarks.answers`). `sent_late_ms` says how far the load generator itself was behind.

What is due in the first `--warm-up` seconds of a level is sent and not counted. Refusals (429) are
counted as such, or with `--insist` sent again after `Retry-After`, while the latency goes on
counting. With `--slo-ms`, the share of all requests that were results in time is the goodput;
`--fail-under` makes the exit status 1 where any level has less. Several keys in `--key-file` are
several callers, told apart in the result. Progress goes to stderr; the last line of stdout is one
JSON object.
"""

from __future__ import annotations

import asyncio
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from benchmarks import asks, scrape
from benchmarks.answers import Window, summary
from benchmarks.arrivals import closed, opened, poisson
from benchmarks.asks import Asks, Classifications, Generations, Kind
from benchmarks.machine import environment
from benchmarks.sending import Access, Sender
from dermaflux import files
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.errors import DermaFluxError

TOO_LITTLE: Final = 1
"""Exit status where the goodput was under `--fail-under`."""
_TOLD: Final = ("name", "bundle", "defaults", "limits")
_PHOTOGRAPHS: Final = 24
_LATE_SHARE: Final = 0.05
"""Of the median latency: a load generator that is later than this measures itself as well."""


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.load`."""

    url: str = option("address of the service, as http://127.0.0.1:3000")
    work: str = option("generate, stream or classify", "generate")
    concurrency: tuple[str, ...] = option("callers of a closed loop, one level after the other", ())
    rate: tuple[str, ...] = option("requests a second of an open loop, level after level", ())
    seconds: float = option("length of a level, without its warm-up", 30.0)
    warm_up: float = option("seconds at the start of a level that do not count", 5.0)
    timeout: float = option("longest time that a request may take, in seconds", 180.0)
    insist: bool = option("send again after Retry-After where the service is busy", False)
    steps: tuple[str, ...] = option("of an image, drawn from these; default: the bundle's", ())
    size: int | None = option("pixels of both sides; default: the bundle's", None)
    images: Path | None = option("folder of photographs to classify, instead of drawn ones", None)
    seed: int = option("of arrivals and requests", 0)
    slo_ms: float | None = option("latency that a result must not pass to count as goodput", None)
    fail_under: float | None = option("least share of goodput; less ends in status 1", None)
    key_file: Path | None = option(
        "file of API keys, one a line, used in turn; without it LOAD_API_KEY is the key", None
    )
    ca: Path | None = option("certificate of who signed the service's, PEM", None)
    client_cert: Path | None = option("our certificate, PEM, where the service wants one", None)
    client_key: Path | None = option("its private key, PEM, if not in the same file", None)
    out: Path | None = option("write the result there too", None)


@dataclass(frozen=True)
class Level:
    """One stretch of load: `callers` in a closed loop, or `rate` a second in an open one."""

    callers: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.callers} callers" if self.rate is None else f"{self.rate:g} a second"


def levels(settings: Settings) -> list[Level]:
    """The levels asked for; 1, 2, 4 and 8 callers if none is.

    Raises:
        DermaFluxError: both kinds, or a number out of range.
    """
    if settings.concurrency and settings.rate:
        raise DermaFluxError(
            "--concurrency is a closed loop and --rate an open one; use one of them in one run"
        )
    if settings.rate:
        return [Level(rate=_number("--rate", text, float, 1e-3)) for text in settings.rate]
    counts = settings.concurrency or ("1", "2", "4", "8")
    return [Level(callers=_number("--concurrency", text, int, 1)) for text in counts]


def asked(settings: Settings) -> Asks:
    """What will be asked.

    Raises:
        DermaFluxError: another kind of work, or a number out of range.
        DatasetError: the folder of photographs has none.
    """
    if settings.work not in asks.PATHS:
        raise DermaFluxError(f"--work {settings.work} is not known; use {', '.join(asks.PATHS)}")
    if settings.work == "classify":
        folder = settings.images
        drawn = partial(asks.drawn, _PHOTOGRAPHS, settings.seed)
        return Classifications(drawn() if folder is None else asks.read(folder))
    steps = [_number("--steps", text, int, 1) for text in settings.steps]
    return Generations(cast(Kind, settings.work), settings.seed, steps, settings.size)


async def measure(
    settings: Settings, wanted: Sequence[Level], questions: Asks
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The service's word on itself, and the figures of each level.

    Raises:
        DermaFluxError: nobody answers there, or not as our service does.
    """
    access = Access.read(settings.key_file, settings.ca, settings.client_cert, settings.client_key)
    found = []
    async with Sender(settings.url, access, settings.timeout, settings.insist) as sender:
        service = await told(sender)
        for level in wanted:
            before = await metrics(sender)
            figures = await _level(settings, level, questions, sender, len(access.keys) or 1)
            after = await metrics(sender)
            figures["metrics"] = scrape.gained(before, after) if before and after else None
            found.append(figures)
            print(_line(level, figures), file=sys.stderr)
    return service, found


async def told(sender: Sender) -> dict[str, Any]:
    """What the service says of itself in its model card.

    Raises:
        DermaFluxError: nobody answers, or not with a card.
    """
    status, body = await sender.get("/v1/model")
    if status != 200:
        raise DermaFluxError(
            f"{sender.url}/v1/model answered {status}, not 200; is it our service, and does it "
            "want a key (--key-file)?"
        )
    card = json.loads(body)
    engines = {one["part"]: f"{one['engine']} {one['precision']}" for one in card["engines"]}
    return {**{key: card.get(key) for key in _TOLD}, "engines": engines}


async def metrics(sender: Sender) -> str:
    """`/metrics`, or nothing where it is not for us."""
    status, body = await sender.get("/metrics")
    return body.decode() if status == 200 else ""


async def _level(
    settings: Settings, level: Level, questions: Asks, sender: Sender, keys: int
) -> dict[str, Any]:
    async def send(number: int, due: float, caller: int) -> Any:
        return await sender.send(questions.ask(number), due, caller)

    whole = settings.warm_up + settings.seconds
    begin = time.monotonic()
    if level.rate is None:
        assert level.callers is not None, "a level has one of both"
        answers = await closed(send, level.callers, whole)
    else:
        answers = await opened(send, poisson(level.rate, whole, settings.seed), keys)
    window = Window(begin + settings.warm_up, begin + whole)
    figures = {**asdict(level), **summary(answers, window, settings.slo_ms)}
    late, waited = figures["sent_late_ms"], figures["latency_ms"]
    if late and waited and late["p99"] > max(10.0, _LATE_SHARE * waited["p50"]):
        figures["warning"] = (
            "the load generator was late itself; run it on another machine, or at a lower rate"
        )
    return figures


def _line(level: Level, figures: dict[str, Any]) -> str:
    waited = figures["latency_ms"] or {}
    good = figures.get("goodput", {}).get("share")
    return (
        f"{level.name}: {figures['results']} of {figures['requests']} results, "
        f"{figures['throughput_per_s']:.3g} a second, p50 {waited.get('p50', math.nan):.0f} ms, "
        f"p95 {waited.get('p95', math.nan):.0f} ms"
        + ("" if good is None else f", goodput {good:.3f}")
        + (f", {figures['faults']}" if figures["faults"] else "")
    )


def _number(name: str, text: str, kind: Callable[[str], Any], least: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < 1e6:
        raise DermaFluxError(f"{name} {text} is out of range; use {least:g} or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    settings = parsed(Settings, "python -m benchmarks.load", __doc__.split("\n\n")[0], arguments)
    words = list(sys.argv[1:] if arguments is None else arguments)
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """Measure, and print the result as one line of JSON; the exit status.

    Raises:
        DermaFluxError: a setting is out of range, or nobody answers.
    """
    at_least(settings, {"seconds": 0.1, "warm_up": 0, "timeout": 0.1, "slo_ms": 0, "fail_under": 0})
    if settings.fail_under is not None and (settings.slo_ms is None or settings.fail_under > 1):
        raise DermaFluxError("--fail-under is a share, 0 to 1, and needs --slo-ms")
    wanted, questions = levels(settings), asked(settings)
    _many_connections()
    service, found = asyncio.run(measure(settings, wanted, questions))
    shares = [one["goodput"]["share"] for one in found if "goodput" in one]
    passed = settings.fail_under is None or min(shares) >= settings.fail_under
    result = {
        "benchmark": "load",
        "command": " ".join(["python -m benchmarks.load", *words]),
        "environment": environment(),
        "service": service,
        "work": settings.work,
        "loop": "open, Poisson" if settings.rate else "closed",
        "seed": settings.seed,
        "insisted": settings.insist,
        "fail_under": settings.fail_under,
        "passed": passed,
        "levels": found,
    }
    if settings.out is not None:
        files.write(settings.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result))
    return 0 if passed else TOO_LITTLE


def _many_connections() -> None:
    """As many open files as the system allows: a slow service has a connection a request."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
