"""Latency of classification in process, by stage, every engine and precision side by side.

    python -m benchmarks.classify_latency --bundle bundles/mini --checkpoint models/mini
    python -m benchmarks.classify_latency --batch 1,8 --photographs datasets/isic2017/images

The stages are those of `dermaflux.classifier`: decoding the JPEG, making it ready (resizing,
normalising, what the gate looks at) and judging a batch (the model, and what is read from it).
Variants and sizes of batches take turns in every round; speed is a ratio to eager torch at the same
size of batch in the same rounds, with its interval. What warms up does not count; the time to open
a variant and its first answer are told apart. The model's floor and the share of it that was
reached are as in `benchmarks.latency`. The largest memory is of `python -m dermaflux classify`,
which judges one photograph at a time, in a process of its own.

Photographs are drawn JPEGs of 600 x 450 pixels, HAM10000's size, or the files of a folder. Progress
goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import asks, flops, peak
from benchmarks.floors import Limits, work_of
from benchmarks.machine import before_measuring
from benchmarks.measuring import alternate, ratio, spread
from benchmarks.results_file import finish, require_place
from benchmarks.variants import classifiers
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import EAGER, Choice
from dermaflux.errors import DermaFluxError, EngineError
from dermaflux.images import decode_upload

STAGES: Final = ("decode", "prepare", "judge")
WARM_UP: Final = 2
_DRAWN: Final = 24
_SIZE: Final = (600, 450)

Spent = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.classify_latency`."""

    bundle: Path = option("bundle with a classifier", Path("bundles/mini"))
    checkpoint: Path | None = option("weights for eager torch, to compare with", None)
    photographs: Path | None = option("folder of photographs, instead of drawn ones", None)
    batch: tuple[str, ...] = option("comma-separated sizes of batches", ("1", "8"))
    rounds: int = option("batches of each variant and size that count", 30)
    threads: int | None = option("of an engine; default: all cores", None)
    no_peak: bool = option("leave out the largest memory, a process for each variant", False)
    out: Path | None = option("write the result there too", None)

    def sizes(self, most: int) -> list[int]:
        """Of batches, ascending.

        Raises:
            DermaFluxError: one is no number, or out of range.
        """
        for text in self.batch:
            if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
                raise DermaFluxError(
                    f"--batch {text} is out of range; use 1 to {most}, the bundle's limit"
                )
        if not self.batch:
            raise DermaFluxError("--batch names no size; use for example 1,8")
        return sorted({int(text) for text in self.batch})


def judge(classifier: Classifier, files: Sequence[bytes]) -> Spent:
    """Seconds by stage for one batch of files."""
    marks = [time.perf_counter()]
    pictures = [decode_upload(file) for file in files]
    marks.append(time.perf_counter())
    ready = [classifier.prepare(picture) for picture in pictures]
    marks.append(time.perf_counter())
    classifier.judge(ready)
    marks.append(time.perf_counter())
    spent = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    return dict(zip(STAGES, spent, strict=True))


def measure(
    opened: Mapping[str, Classifier], sizes: Sequence[int], files: Sequence[bytes], rounds: int
) -> tuple[dict[tuple[str, int], list[Spent]], dict[tuple[str, int], float]]:
    """The rounds that count by variant and size of batch, in turn; and seconds of the first."""
    rows: dict[tuple[str, int], list[Spent]] = {(n, size): [] for n in opened for size in sizes}

    def side(name: str, size: int, number: int) -> None:
        chosen = [files[(number * size + row) % len(files)] for row in range(size)]
        rows[name, size].append(judge(opened[name], chosen))

    sides: dict[str, Callable[[int], object]] = {
        f"{name}, {size}": partial(side, name, size) for name, size in rows
    }
    alternate(sides, rounds, WARM_UP)
    first = {key: sum(spent[0].values()) for key, spent in rows.items()}
    return {key: spent[WARM_UP:] for key, spent in rows.items()}, first


def figures(spent: Sequence[Spent], size: int) -> dict[str, Any]:
    """Percentiles by stage, in ms a batch, and images a second of the median batch."""
    total = [sum(one.values()) for one in spent]
    return {
        "images_per_second": round(size / statistics.median(total), 2),
        "ms_per_image": round(1e3 * statistics.median(total) / size, 3),
        "total": spread(total),
        **{stage: spread([one[stage] for one in spent]) for stage in STAGES},
    }


def peak_mb(bundle: Bundle, choice: Choice, checkpoint: Path | None, file: bytes) -> float:
    """The most memory of `python -m dermaflux classify` with the same engine, in MB.

    Raises:
        EngineError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder) / "photograph.jpg"
        photograph.write_bytes(file)
        words = ["--bundle", str(bundle.path), "--engine", choice.engine]
        if choice.engine == EAGER:
            words += ["--checkpoint", str(checkpoint)]
        else:
            words += ["--precision", choice.precision]
        command = [sys.executable, "-m", "dermaflux", "classify", *words, str(photograph)]
        return round(peak.peak_of(command) / 1e6, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the result is the last line of stdout."""
    settings = parsed(
        Settings, "python -m benchmarks.classify_latency", __doc__.split("\n\n")[0], arguments
    )
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> None:
    """What the command does; `words` are those of its command line.

    Raises:
        DermaFluxError: an option is out of range, or bundle, engine or photographs cannot be had.
    """
    at_least(settings, {"rounds": 1, "threads": 1})
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    sizes = settings.sizes(bundle.limits.max_batch)
    files = _files(settings.photographs)
    before = before_measuring()
    choices = {f"{one.engine} {one.precision}": one for one in classifiers(bundle)}
    if settings.checkpoint is not None:
        choices = {EAGER: Choice("classifier", EAGER, "fp32", "asked for"), **choices}
    if not choices:
        raise EngineError("no engine can run the classifier here; the lines above say why")
    opened: dict[str, Classifier] = {}
    opening: dict[str, float] = {}
    for name, choice in choices.items():
        began = time.perf_counter()
        opened[name] = Classifier.open(
            bundle, choice.engine, choice.precision, threads=settings.threads,
            checkpoint=settings.checkpoint if choice.engine == EAGER else None,
        )  # fmt: skip
        opening[name] = time.perf_counter() - began
    limits = Limits.measured()
    rows, first = measure(opened, sizes, files, settings.rounds)
    table: dict[str, Any] = {}
    for name, choice in choices.items():
        file = bundle.parts["classifier"].files.get(choice.precision)
        table[name] = {
            "engine": opened[name].engine.name,
            "precision": opened[name].engine.precision,
            "quantized": {} if file is None else file.quantized_ops.get(choice.engine, {}),
            "open_ms": round(1e3 * opening[name], 3),
            "first_answer_ms": round(1e3 * first[name, sizes[0]], 3),
            "batches": {
                str(size): _row(bundle, choice, rows, name, size, limits) for size in sizes
            },
        }
    opened.clear()
    if not settings.no_peak:
        for name, choice in choices.items():
            print(f"the largest memory of {name}", file=sys.stderr)
            table[name]["peak_mb"] = peak_mb(bundle, choice, settings.checkpoint, files[0])
    assert bundle.classifier is not None, "`classifiers` refuses a bundle without one"
    result = {
        "environment": before,
        "input_size": list(bundle.classifier.input_size),
        "photographs": len(files),
        "gate": bundle.classifier.intake is not None,
        "rounds": settings.rounds,
        "floor": limits.told(),
        "variants": table,
    }
    finish("classify_latency", result, words, settings.out, bundle)


def _row(
    bundle: Bundle,
    choice: Choice,
    rows: Mapping[tuple[str, int], Sequence[Spent]],
    name: str,
    size: int,
    limits: Limits,
) -> dict[str, Any]:
    row = figures(rows[name, size], size)
    # The size in pixels is no free axis of a classifier, so any will do.
    work = work_of(bundle, ["classifier"], size, bundle.model.scale, bundle.model.scale)
    if "classifier" in work:
        held = bundle.parts["classifier"].files
        precision = choice.precision if choice.precision in held else next(iter(held))
        weights = flops.weights(bundle, "classifier", precision)
        least = limits.least(work["classifier"], weights, choice.precision)
        judging = statistics.median(one["judge"] for one in rows[name, size])
        row["gflop"] = round(work["classifier"].flops / 1e9, 4)
        row["floor"] = least.share(judging)
    if (EAGER, size) in rows:
        pair = ([sum(one.values()) for one in rows[key, size]] for key in (EAGER, name))
        found = ratio(*pair)
        row["times_eager"] = round(found.median, 3)
        row["times_eager_95"] = [round(found.low, 3), round(found.high, 3)]
    return row


def _files(folder: Path | None) -> list[bytes]:
    if folder is not None:
        return [data for data, _ in asks.read(folder)]
    return [asks.photograph((0, number), _SIZE, "JPEG")[0] for number in range(_DRAWN)]


if __name__ == "__main__":
    sys.exit(main())
