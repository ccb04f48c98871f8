"""Joining a batch at any step beside first come, first served, at the same arrivals.

    python -m benchmarks.queueing --out benchmarks/results/queueing_mini_cpu.json
    python -m benchmarks.queueing --clock cpu --threads 1        # on a machine that others use too

Requests arrive as a Poisson process would have them, seeded and fixed beforehand; their steps are
drawn from a range, their size is the bundle's. The same list is served twice in every round, once
with a limit of 1 (each image is drawn to its end, in order of arrival) and once with the limit that
the warm-up chooses (`dermaflux.gains`), on what the service's generator runs
(`dermaflux.underway`), without HTTP and files. Latency is counted from when a request was due to
when its pixels are there, so nothing is left out while the machine is busy. Arrivals are a share of
what first come can do at most, which is measured before. The sides alternate; what counts is the
median of the rounds' ratios. With `--clock cpu` a second is one of this process's processor time,
which others who use the machine hardly change, and pauses are skipped; an engine of several threads
looks slower by it than it is. Progress goes to stderr; the last line of stdout is one JSON object.

What to expect is worked out before anything is served (`benchmarks.queue_theory`), and is in the
result: `predicted_mean_ratio` for these arrivals, `long_run_mean_ratio` for endless ones. In words:
at half load, where there is mostly one request, joining changes little and may lose some
hundredths, because a request that arrives halves the speed of the one before it; towards full load
it wins what batches gain, and past what first come can do it still keeps up. Short requests win
more than long ones.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.machine import environment
from benchmarks.queue_theory import Cost, costs, long_run, simulated
from dermaflux import files
from dermaflux.command import at_least, ended
from dermaflux.errors import DermaFluxError
from dermaflux.pipeline import Pipeline
from dermaflux.prompt import COLORS, Lesion, caption
from dermaflux.request import Request
from dermaflux.underway import Underway

FIRST_COME: Final = 1


@dataclass(frozen=True)
class Arrival:
    """A request, and when it is due: seconds after the start of a round."""

    due: float
    request: Request


@dataclass(frozen=True)
class Side:
    """One side of a round: seconds of latency, and images a second from first due to last done."""

    mean: float
    p95: float
    images_per_second: float


class Clock:
    """The machine's time; a test has one that it moves itself."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, then: float) -> None:
        time.sleep(max(0.0, then - self.now()))


class CpuClock(Clock):
    """Processor time of this process; nobody has to wait for a pause to pass."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def now(self) -> float:
        return time.process_time() + self._skipped

    def sleep_until(self, then: float) -> None:
        self._skipped += max(0.0, then - self.now())


CLOCKS: Final = {"wall": Clock, "cpu": CpuClock}


def arrivals(pipeline: Pipeline, count: int, steps: tuple[int, int], seed: int) -> list[Arrival]:
    """Requests of the bundle's size that arrive once a second on average; the same for a seed."""
    chance = random.Random(seed)
    due = accumulate(chance.expovariate(1.0) for _ in range(count))
    words = [
        caption(Lesion(label=label, colors=(colour,)))
        for label in ("benign", "malignant")
        for colour in COLORS
    ]
    return [
        Arrival(at, pipeline.request(chance.choice(words), seed=i, steps=chance.randint(*steps)))
        for i, at in enumerate(due)
    ]


def serve(
    pipeline: Pipeline, wanted: Sequence[Arrival], rate: float, limit: int, clock: Clock
) -> list[float]:
    """Latency of each request, with `rate` of them due a second and at most `limit` together."""
    images: Underway[int] = Underway(pipeline)
    begin = clock.now()
    due = [begin + arrival.due / rate for arrival in wanted]
    waiting = list(range(len(wanted)))[::-1]
    latency: dict[int, float] = {}
    while len(latency) < len(wanted):
        joining: dict[int, Request] = {}
        while waiting and len(images.keys) + len(joining) < limit:
            if due[waiting[-1]] > clock.now():
                break
            index = waiting.pop()
            joining[index] = wanted[index].request
        images.join(joining)
        if not images.keys:
            clock.sleep_until(due[waiting[-1]])
            continue
        for size in images.sizes:
            images.step(size)
        if finished := images.finished():
            images.develop(finished)
            now = clock.now()
            latency.update((index, now - due[index]) for index in finished)
    return [latency[index] for index in range(len(wanted))]


def side(wanted: Sequence[Arrival], rate: float, latency: Sequence[float]) -> Side:
    """What a side is judged by."""
    ends = [one.due / rate + seconds for one, seconds in zip(wanted, latency, strict=True)]
    return Side(
        mean=statistics.fmean(latency),
        p95=float(np.quantile(latency, 0.95)),
        images_per_second=len(wanted) / (max(ends) - wanted[0].due / rate),
    )


def measure(
    pipeline: Pipeline, wanted: Sequence[Arrival], shares: Sequence[float], limit: int,
    rounds: int, clock: Clock,
) -> list[dict[int, Side]]:  # fmt: skip
    """Round by round and share by share, both sides; each share's rate is that of its round."""
    found = []
    for number in range(rounds):
        # Without arrivals to wait for, and anew in every round: the machine changes.
        spent = clock.now()
        serve(pipeline, wanted, 1e9, FIRST_COME, clock)
        most = len(wanted) / (clock.now() - spent)
        for share in shares:
            order = (FIRST_COME, limit) if number % 2 == 0 else (limit, FIRST_COME)
            both = {
                one: side(wanted, share * most, serve(pipeline, wanted, share * most, one, clock))
                for one in order
            }
            found.append(both)
            print(f"round {number + 1} of {rounds}, share {share:g}: {both}", file=sys.stderr)
    return found


def expected(
    share: float, wanted: Sequence[Arrival], limit: int, cost: Cost
) -> dict[str, float | None]:
    """Mean latency with `limit` over that of first come: for these arrivals, and endless ones."""
    steps = [one.request.steps for one in wanted]
    rate = share * len(steps) / sum(cost.seconds(count) for count in steps)
    dues = [one.due / rate for one in wanted]
    joining, first_come = (
        statistics.fmean(simulated(dues, steps, most, cost)) for most in (limit, FIRST_COME)
    )
    endless = long_run(share, cost, limit)
    return {
        "predicted_mean_ratio": round(joining / first_come, 3),
        "long_run_mean_ratio": endless and round(endless, 3),
    }


def report(
    shares: Sequence[float], limit: int, sides: Sequence[Mapping[int, Side]],
    expectations: Mapping[float, Mapping[str, float | None]],
) -> list[dict[str, Any]]:  # fmt: skip
    """By share: medians over rounds of both sides' figures, and of ratios within a round."""
    table = []
    for place, share in enumerate(shares):
        rounds = sides[place :: len(shares)]
        ratios = {
            f"median_{name}_ratio": round(
                statistics.median(
                    getattr(one[limit], name) / getattr(one[FIRST_COME], name) for one in rounds
                ),
                3,
            )
            for name in ("mean", "p95", "images_per_second")
        }
        medians = {
            words: {
                name: round(statistics.median(getattr(one[who], name) for one in rounds), 3)
                for name in ("mean", "p95", "images_per_second")
            }
            for words, who in (("first_come", FIRST_COME), ("joining", limit))
        }
        table.append(
            {
                "share": share,
                **medians,
                **ratios,
                **expectations[share],
                "rounds": [{str(who): asdict(one) for who, one in r.items()} for r in rounds],
            }
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.queueing", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, default=Path("bundles/mini"))
    parser.add_argument("--requests", type=int, default=100, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.5, 0.8, 0.95],
        help="arrivals over what first come can do",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, nargs=2, default=[4, 20], help="from and to")
    parser.add_argument("--limit", type=int, help="of the joining side; default: by measured gains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of an engine; default: all cores")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall or processor time")
    parser.add_argument("--out", type=Path, help="write the result there too")
    options = parser.parse_args(arguments)
    return ended(lambda: run(options, list(arguments or sys.argv[1:])))


def run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure, and print the result as one line of JSON; `words` are those of the command line."""
    at_least(options, dict.fromkeys(("requests", "rounds", "limit", "threads"), 1))
    if min(options.shares) <= 0:
        raise DermaFluxError(f"--shares {min(options.shares):g} is no share; use more than 0")
    steps = (options.steps[0], options.steps[1])
    if not 1 <= steps[0] <= steps[1]:
        raise DermaFluxError(f"--steps {steps[0]} {steps[1]} is no range; use the smaller first")
    pipeline = Pipeline.open(options.bundle, threads=options.threads)
    clock = CLOCKS[options.clock]()
    cost = costs(pipeline, steps, clock.now)
    limit = options.limit or max(2, cost.gains.limit())
    wanted = arrivals(pipeline, options.requests, steps, options.seed)
    foretold = {share: expected(share, wanted, limit, cost) for share in options.shares}
    print(f"limit {limit}; {foretold}", file=sys.stderr)
    sides = measure(pipeline, wanted, options.shares, limit, options.rounds, clock)
    choice = pipeline.choices["transformer"]
    result = {
        "benchmark": "queueing",
        "command": " ".join(["python -m benchmarks.queueing", *words]),
        "environment": environment(),
        "bundle": str(options.bundle),
        "engine": choice.engine,
        "precision": choice.precision,
        "threads": options.threads,
        "clock": options.clock,
        "size": list(cost.gains.size),
        "steps": list(steps),
        "requests": options.requests,
        "step_ms_by_batch": {b: round(1e3 * s, 2) for b, s in cost.gains.seconds.items()},
        "rest_ms": round(1e3 * cost.rest, 2),
        "limit_by_gains": cost.gains.limit(),
        "limit": limit,
        "shares": report(options.shares, limit, sides, foretold),
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
