"""Images a second of a bundle's classifier in this process alone: what a service can at most reach.

    python -m benchmarks.classify_rate --bundle bundles/b16 --seconds 10

Files are read, made ready and judged a batch after the other, as `dermaflux.classifier` is used in
a program. `decoded` leaves out the reading of files: there the pictures are in memory as pixels.
Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from benchmarks import asks, processes
from benchmarks.asks import photograph
from benchmarks.machine import before_measuring
from benchmarks.results_file import finish
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.images import decode_upload

SIZE: Final = (600, 450)
"""Width and height of HAM10000's photographs."""
DRAWN: Final = 24


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.classify_rate`."""

    bundle: Path = option("bundle with a classifier", Path("bundles/mini"))
    images: Path | None = option("folder of photographs, instead of drawn ones", None)
    engine: str | None = option("force one engine", None)
    precision: str | None = option("force one precision", None)
    tier: str | None = option("what may be given up for speed", None)
    seconds: float = option("length of either measurement", 10.0)
    warm_up: float = option("seconds before, which do not count", 2.0)
    batch: int | None = option("pictures at a time; default: the bundle's largest batch", None)
    threads: int | None = option("of the engine; default: all cores", None)
    seed: int = option("of drawn photographs", 0)


def photographs(folder: Path | None, seed: int) -> list[tuple[bytes, str]]:
    """Files with their content types: of a folder, or drawn JPEGs of `SIZE`.

    Raises:
        DatasetError: the folder has none.
    """
    if folder is not None:
        return asks.read(folder)
    return [photograph((seed, number), SIZE, "JPEG") for number in range(DRAWN)]


def rate(work: Callable[[int], None], batch: int, warm_up: float, seconds: float) -> float:
    """Images a second of `work`, which is given the number of the batch to do."""
    number = 0
    end = time.monotonic() + warm_up
    while number == 0 or time.monotonic() < end:
        work(number)
        number += 1
    first, begin = number, time.monotonic()
    while time.monotonic() - begin < seconds:
        work(number)
        number += 1
    return batch * (number - first) / (time.monotonic() - begin)


def measure(settings: Settings, bundle: Bundle) -> dict[str, Any]:
    """Both rates, processor seconds, and what each photograph gives.

    Raises:
        BundleError: the bundle has no classifier.
        EngineError: an engine cannot be had.
    """
    classifier = Classifier.open(
        bundle,
        settings.engine,
        settings.precision,
        tier=settings.tier,
        threads=settings.threads,
    )
    assert classifier.choice is not None, "opened from a bundle"
    files = [data for data, _ in photographs(settings.images, settings.seed)]
    pictures = [decode_upload(data) for data in files]
    batch = settings.batch or bundle.limits.max_batch

    def chosen(things: Sequence[Any], number: int) -> list[Any]:
        return [things[(number * batch + place) % len(things)] for place in range(batch)]

    def judged(some: Sequence[Image.Image]) -> None:
        classifier.judge([classifier.prepare(one) for one in some])

    usage = time.process_time()
    begin = time.monotonic()
    from_files = rate(
        lambda number: judged([decode_upload(data) for data in chosen(files, number)]),
        batch, settings.warm_up, settings.seconds,
    )  # fmt: skip
    cpu, spent = time.process_time() - usage, time.monotonic() - begin
    decoded = rate(
        lambda number: judged(chosen(pictures, number)), batch, settings.warm_up, settings.seconds
    )
    answers = [
        one.prediction for one in classifier.judge([classifier.prepare(p) for p in pictures])
    ]
    return {
        "engine": classifier.engine.name,
        "precision": classifier.engine.precision,
        "batch": batch,
        "from_files_per_s": round(from_files, 4),
        "decoded_per_s": round(decoded, 4),
        "cpu_s_per_1000": round(1e3 * cpu / spent / from_files, 2),
        "rss_bytes": processes.seen([os.getpid()]).rss_bytes,
        "answers": [
            {"probability": one.probability, "decision": one.decision, "accepted": one.accepted}
            for one in answers
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    assert __doc__ is not None
    words = "python -m benchmarks.classify_rate"
    settings = parsed(Settings, words, __doc__.split("\n\n")[0], arguments)
    return ended(lambda: run(settings, sys.argv[1:] if arguments is None else arguments))


def run(settings: Settings, words: Sequence[str]) -> None:
    """Measure, and print the result as one line of JSON.

    Raises:
        DermaFluxError: a setting is out of range, or the bundle cannot be used.
    """
    at_least(settings, {"seconds": 0.1, "warm_up": 0, "batch": 1, "threads": 1})
    bundle = Bundle.open(settings.bundle)
    result = {"environment": before_measuring(), **measure(settings, bundle)}
    finish("classify_rate", result, words, None, bundle)


if __name__ == "__main__":
    sys.exit(main())
