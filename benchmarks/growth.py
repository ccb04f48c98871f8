"""How cost grows with steps, pixels and images at once, and how cores help; ours beside diffusers.

    python -m benchmarks.growth --bundle bundles/mini --checkpoint models/mini \\
        --out benchmarks/results/growth_cpu.json

Along each axis all else stays at the bundle's defaults. A point is the milliseconds of one picture
from its prompt to its PNG, ours (the engine that the bundle's own choice is) and diffusers eager in
fp32, alternated, and the floor of the same work. What matters is how the three grow: where ours
grows as the floor does, the machine is the limit; a part that does not grow is overhead, and the
line through the points along the steps tells it apart (`fixed_ms`). `exponents` are slopes in
logarithms: 1 is in proportion. Progress goes to stderr; the last line of stdout is one JSON object,
which `python -m benchmarks.report` plots.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.floors import Limits
from benchmarks.ladder import Effort, climb
from benchmarks.ladder_generation import alike, floor_of, our_rung, rival
from benchmarks.machine import before_measuring
from benchmarks.results_file import finish, keep, require_place
from benchmarks.rivals import flux_torch
from benchmarks.rivals.flux_torch import Rival
from benchmarks.rivals.task import Task
from benchmarks.variants import same_model
from dermaflux.bundle import Bundle
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import usable_cores
from dermaflux.errors import DermaFluxError
from dermaflux.pipeline import Pipeline

AXES: Final = ("steps", "pixels", "batch", "threads")
_STEPS: Final = (1, 2, 5, 10, 20, 40)
_SIDES: Final = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
_BATCHES: Final = (1, 2, 4, 8)


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.growth`."""

    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    checkpoint: Path = option("the weights that it was exported from", Path("models/mini"))
    axes: tuple[str, ...] = option(f"comma-separated, of {', '.join(AXES)}", AXES)
    rounds: int = option("of each point at most; fewer where one takes long", 10)
    seconds: float = option("that a point may take", 15.0)
    points: int | None = option("of each axis at most, the smallest; default: all", None)
    threads: int | None = option("of both sides; default: all cores", None)
    out: Path | None = option("write the result there too, after every axis", None)


@dataclass(frozen=True)
class Point:
    """One place on an axis: how much, the task there, pictures at once, threads."""

    x: int
    task: Task
    images: int = 1
    threads: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the result is the last line of stdout."""
    settings = parsed(Settings, "python -m benchmarks.growth", __doc__ or "", arguments)
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> None:
    """What the command does.

    Raises:
        DermaFluxError: an option is out of range, or there is nothing to compare with.
    """
    at_least(settings, {"rounds": 1, "seconds": 0.1, "points": 1, "threads": 1})
    unknown = [name for name in settings.axes if name not in AXES]
    if unknown or not settings.axes:
        raise DermaFluxError(f"--axes {','.join(unknown)} is not known; use {', '.join(AXES)}")
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    same_model(bundle, settings.checkpoint)
    before = before_measuring()
    threads = settings.threads or usable_cores()
    limits = Limits.measured()
    theirs = flux_torch.eager(settings.checkpoint, threads)
    opened = {threads: Pipeline.open(bundle, threads=threads)}
    engine = opened[threads].engines["transformer"]
    most = opened[threads].batch(bundle.defaults.height, bundle.defaults.width)
    found = places(Task.of(bundle), bundle.limits.size_multiple, most, threads)
    result: dict[str, Any] = {
        "environment": before,
        "threads": threads,
        "task": Task.of(bundle).told(),
        "ours": f"{engine.name} {engine.precision}",
        "theirs": "diffusers eager fp32",
        "machine_limits": limits.told(),
        "axes": {},
    }
    effort = Effort(settings.rounds, settings.seconds)
    for axis in settings.axes:
        points = []
        for place in found[axis][: settings.points]:
            count = place.threads or threads
            if count not in opened:
                opened[count] = Pipeline.open(bundle, threads=count)
            points.append(
                {"x": place.x, **measured(place, opened[count], theirs, count, bundle, limits,
                                          effort)}
            )  # fmt: skip
            if axis == "threads" and count < usable_cores():
                # Rates were measured with all cores.
                points[-1] |= {"floor_ms": None, "floor_fp32_ms": None}
            print(f"{axis} {place.x}: {points[-1]}", file=sys.stderr)
        result["axes"][axis] = axis_of(points)
        keep("growth", result, settings.out)
    finish("growth", result, words, settings.out, bundle)


def places(task: Task, multiple: int, most: int, threads: int) -> dict[str, list[Point]]:
    """The points of every axis that the bundle takes."""
    steps, smallest, largest = task.limits
    sides = [side for side in _SIDES if smallest <= side <= largest and side % multiple == 0]
    return {
        "steps": [Point(count, task.at(steps=count)) for count in _STEPS if count <= steps],
        "pixels": [Point(side * side, task.at(side=side)) for side in sides],
        "batch": [Point(size, task, images=size) for size in _BATCHES if size <= most],
        "threads": [Point(count, task, threads=count) for count in range(1, threads + 1)],
    }


def measured(
    place: Point, ours: Pipeline, theirs: Rival, threads: int, bundle: Bundle, limits: Limits,
    effort: Effort,
) -> dict[str, Any]:  # fmt: skip
    """Both sides at one point, milliseconds an image, and the floor of that work.

    Raises:
        DermaFluxError: the two drew different pictures.
    """
    import torch

    torch.set_num_threads(threads)
    precision = ours.engines["transformer"].precision
    opened: Callable[[], Rival] = lambda: theirs  # noqa: E731
    rungs = [
        rival("theirs", "", opened, place.task, place.images),
        our_rung("ours", "", partial(_same, ours), place.task, place.images, precision=precision),
    ]
    base, own = climb(rungs, effort, floor_of(bundle, place.task, limits), alike)
    if own["wrong"]:
        raise DermaFluxError(
            f"at {place.x} ours and diffusers drew different pictures ({own['alike']}); nothing "
            "can be said of their times. Export the bundle again from this checkpoint"
        )
    floors = {name: row["floor"]["ms"] for name, row in (("fp32", base), ("own", own))
              if "floor" in row}  # fmt: skip
    return {
        "theirs_ms": base["p50_ms"],
        "ours_ms": own["p50_ms"],
        "times": own["times_baseline"],
        "floor_ms": floors.get("own"),
        "floor_fp32_ms": floors.get("fp32"),
        "gflop": own.get("floor", {}).get("gflop"),
        "psnr_db": own["alike"]["psnr_db"],
        "rounds": own["rounds"],
        "stages_ms": {"ours": own["stages_ms"], "theirs": base["stages_ms"]},
    }


def _same(pipeline: Pipeline) -> Pipeline:
    return pipeline


def axis_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An axis for the result: its points, exponents, and the line through them."""
    curves = ("ours_ms", "theirs_ms", "floor_ms")
    known = [name for name in curves if all(point.get(name) for point in points)]
    found: dict[str, Any] = {"points": [dict(point) for point in points]}
    if len(points) > 1:
        x = [float(point["x"]) for point in points]
        found["exponents"] = {name: exponent(x, [p[name] for p in points]) for name in known}
        found["lines"] = {name: line(x, [p[name] for p in points]) for name in known}
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares: y grows as x to this power."""
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 3)


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """y = fixed + each * x, by least squares of relative errors, so that small ones count too."""
    each, fixed = np.polyfit(x, y, 1, w=1 / np.asarray(y))
    return {"fixed_ms": round(float(fixed), 4), "each_ms": float(f"{each:.5g}")}


if __name__ == "__main__":
    sys.exit(main())
