"""From the start of a process to its first image, by a clock outside of it.

    python -m benchmarks.cold_start --bundle bundles/mini --starts 7
    python -m benchmarks.cold_start --fail-over 3 --out benchmarks/results/cold_start.json

Each start is a new process: `python -m dermaflux generate` until its PNG is written and until it
has ended, `classify` until its answer, and the service until `/readyz` says 200 (asked ten times a
second) and until the first picture has come over HTTP. Where the time goes is told by starts of
`benchmarks.started`, which does the same and looks at the clock: the interpreter, imports, opening
and choosing, comparing the files with their sha256, the engine's library, loading and compiling,
and the first image, which no image has warmed up. Kinds of starts take turns; figures are medians.

One start of each kind goes before and does not count: the page cache is warm, and Python's bytecode
is there. `--drop-caches`, as root, empties the page cache of the whole machine before each start
instead. `--fail-over` ends in status 1 where the first image of the command takes longer. Progress
goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.asks import photograph
from benchmarks.captions import captions
from benchmarks.http_sides import HOST, PORT, Side, started
from benchmarks.machine import before_measuring
from benchmarks.measuring import turn
from benchmarks.results_file import finish, require_place
from dermaflux.bundle import Bundle
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import choose
from dermaflux.errors import DermaFluxError, EngineError
from dermaflux.tiers import tier

GOAL_S: Final = 3.0
"""The first image after a process began, from a built bundle."""
TOO_SLOW: Final = 1
"""Exit status where the first image took longer than `--fail-over`."""
_DROP: Final = Path("/proc/sys/vm/drop_caches")
_PHOTOGRAPH: Final = (600, 450)
"""Pixels across and down, HAM10000's."""

_ANSWER_SECONDS: Final = 120.0

Timed = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.cold_start`."""

    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    engine: str | None = option("default: the fastest", None)
    precision: str | None = option("default: the fastest", None)
    tier: str | None = option("of the generator: what may be given up for speed", None)
    steps: int | None = option("of the first image; default: the bundle's", None)
    starts: int = option("of each kind that count", 5)
    no_service: bool = option("leave out the service, whose start takes longest", False)
    drop_caches: bool = option("empty the page cache before each start, as root", False)
    fail_over: float | None = option("seconds of the first image; more ends in status 1", None)
    out: Path | None = option("write the result there too", None)

    @property
    def forced(self) -> dict[str, str]:
        """Engine, precision and tier, where they are asked for."""
        given = {"engine": self.engine, "precision": self.precision, "tier": self.tier}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Ended:
    """A process from outside: the monotonic clock and the day's when it began, both in ns, how long
    it ran, its processor seconds, what it said."""

    began: int
    began_at: int
    seconds: float
    cpu_s: float
    said: str


def ran(command: Sequence[str]) -> Ended:
    """Run a command to its end.

    Raises:
        EngineError: it failed; with its last words.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, began_at = time.monotonic_ns(), time.time_ns()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = (time.monotonic_ns() - began) / 1e9
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise EngineError(f"{' '.join(command)} failed: {done.stderr.strip()[-1000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(began, began_at, seconds, cpu, done.stdout)


def command_generate(settings: Settings, folder: Path) -> Timed:
    """`python -m dermaflux generate`: until the PNG is written, and until the process has ended."""
    out = folder / "image.png"
    out.unlink(missing_ok=True)
    words = ["--prompt", captions(1)[0], "--seed", "0", "--out", str(out)]
    if settings.steps is not None:
        words += ["--steps", str(settings.steps)]
    done = ran([*_product("generate", settings), *words])
    written = (out.stat().st_mtime_ns - done.began_at) / 1e9
    return {"written_s": written, "ended_s": done.seconds, "cpu_s": done.cpu_s}


def command_classify(settings: Settings, photo: Path) -> Timed:
    """`python -m dermaflux classify` of one photograph."""
    done = ran([*_product("classify", settings), str(photo)])
    return {"ended_s": done.seconds, "cpu_s": done.cpu_s}


def split(kind: str, settings: Settings, path: Path) -> Timed:
    """The same in `benchmarks.started`: seconds by stage, and in all."""
    asked: dict[str, Any] = dict(settings.forced)
    if settings.steps is not None:
        asked["steps"] = settings.steps
    command = [sys.executable, "-m", "benchmarks.started", kind, str(settings.bundle)]
    done = ran([*command, json.dumps(asked), str(path)])
    moments: dict[str, int] = json.loads(done.said.splitlines()[-1])
    spent: Timed = {}
    before = done.began
    for stage, moment in moments.items():
        spent[f"{stage}_s"] = (moment - before) / 1e9
        before = moment
    return {**spent, "total_s": (before - done.began) / 1e9}


def served(settings: Settings) -> Side:
    """The service over the bundle."""
    return Side(
        "the service",
        (sys.executable, "-m", "bentoml", "serve", "serving.service:DermaFlux",
         "--host", HOST, "--port", PORT),
        {
            "DERMAFLUX_BUNDLE": str(settings.bundle), "BENTOML_DO_NOT_TRACK": "true",
            **{f"DERMAFLUX_{name.upper()}": value for name, value in settings.forced.items()},
        },
        "/readyz",
    )  # fmt: skip


def service(settings: Settings, side: Side, folder: Path) -> Timed:
    """A server: until it is ready, until its first picture has come; processor seconds until then.

    Raises:
        DermaFluxError: it does not start, or answers with an error.
    """
    asked: dict[str, Any] = {"lesion": {"label": "benign", "diagnosis": "nevus"}, "seed": 0}
    if settings.steps is not None:
        asked["steps"] = settings.steps
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with started(side, folder / "service.log") as running:
        request = urllib.request.Request(
            f"{running.url}/v1/generate", json.dumps(asked).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        began = time.monotonic()
        try:
            with opener.open(request, timeout=_ANSWER_SECONDS) as reply:
                reply.read()
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")[:300]
            raise DermaFluxError(f"{side.name} answered {error.code}: {told}") from error
        image = time.monotonic() - began
        cpu = running.cpu_s()
    total = running.start_s + image
    return {"ready_s": running.start_s, "image_s": image, "total_s": total, "cpu_s": cpu}


def measure(settings: Settings, bundle: Bundle, folder: Path) -> dict[str, list[Timed]]:
    """Starts of every kind in turn, without the ones that warm up.

    Raises:
        DermaFluxError: a start failed.
    """
    photo = folder / "photograph.jpg"
    photo.write_bytes(photograph(0, _PHOTOGRAPH, "JPEG")[0])
    kinds: dict[str, Callable[[], Timed]] = {
        "generate": partial(command_generate, settings, folder),
        "generate, by stage": partial(split, "generate", settings, folder / "split.png"),
    }
    if bundle.classifier is not None:
        kinds["classify"] = partial(command_classify, settings, photo)
        kinds["classify, by stage"] = partial(split, "classify", settings, photo)
    if not settings.no_service:
        kinds["service"] = partial(service, settings, served(settings), folder)
    found: dict[str, list[Timed]] = {kind: [] for kind in kinds}
    for number in range(0 if settings.drop_caches else -1, settings.starts):
        for kind in turn(tuple(kinds), number):
            if settings.drop_caches:
                drop_caches()
            spent = kinds[kind]()
            if number >= 0:
                found[kind].append(spent)
            shown = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in spent.items())
            print(f"{'warm-up' if number < 0 else number + 1} {kind}: {shown}", file=sys.stderr)
    return found


def drop_caches() -> None:
    """Empty the page cache of this machine.

    Raises:
        DermaFluxError: this is not root, or no Linux.
    """
    os.sync()
    try:
        _DROP.write_text("3\n")
    except OSError as error:
        raise DermaFluxError(
            f"--drop-caches writes {_DROP}, which this process may not ({error.strerror}); run it "
            "as root on Linux, or leave the option out"
        ) from error


def medians(starts: Sequence[Timed]) -> Timed:
    """Of each figure over starts, in seconds."""
    return {name: round(statistics.median(one[name] for one in starts), 3) for name in starts[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the result is the last line of stdout."""
    settings = parsed(
        Settings, "python -m benchmarks.cold_start", __doc__.split("\n\n")[0], arguments
    )
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> int:
    """What the command does; `words` are those of its command line.

    Raises:
        DermaFluxError: an option is out of range, the bundle cannot be run, or a start failed.
    """
    at_least(settings, {"starts": 1, "steps": 1, "fail_over": 0})
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    chosen = None if settings.tier is None else tier(settings.tier)
    choice = choose(bundle, "transformer", settings.engine, settings.precision, tier=chosen)
    before = before_measuring()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(settings, bundle, Path(folder))
    table = {kind: medians(starts) for kind, starts in found.items()}
    first = table["generate"]["written_s"]
    result = {
        "environment": before,
        "engine": choice.engine,
        "precision": choice.precision,
        "tier": settings.tier,
        "steps": settings.steps or bundle.defaults.steps,
        "starts": settings.starts,
        "page_cache": "dropped before each start" if settings.drop_caches else "warm",
        "first_image_s": first,
        "goal_s": GOAL_S,
        "goal_met": first < GOAL_S,
        "medians": table,
        "each": found,
    }
    finish("cold_start", result, words, settings.out, bundle)
    if settings.fail_over is not None and first > settings.fail_over:
        print(f"the first image took {first} s, more than {settings.fail_over:g}", file=sys.stderr)
        return TOO_SLOW
    return 0


def _product(command: str, settings: Settings) -> list[str]:
    # Tiers of the generator: the classifier has others.
    given = {k: v for k, v in settings.forced.items() if command == "generate" or k != "tier"}
    forced = [word for name, value in given.items() for word in (f"--{name}", value)]
    start = [sys.executable, "-m", "dermaflux", command]
    return [*start, "--bundle", str(settings.bundle), *forced]


if __name__ == "__main__":
    sys.exit(main())
