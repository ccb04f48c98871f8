"""Latency of images in process, by stage, every engine and precision of a bundle side by side.

    python -m benchmarks.latency --bundle bundles/mini --checkpoint models/mini
    python -m benchmarks.latency --tier int8,cached --batch 4 --size 256
    python -m benchmarks.latency --out benchmarks/results/latency.json

The variants take turns in every round, so that a noisy machine disturbs all alike; figures are
medians and percentiles, and speed is a ratio to eager torch of the same round, with its interval.
What warms up does not count and is told apart: the time to open a variant (its library is imported
then, if nobody has yet), and its first image.
The most memory that a variant takes is measured in a process of its own, the product's command.

Beside each stage stands its floor: its operations over the best rate of a large product of matrices
in the precision in use, and its weights over the bandwidth of memory where no cache holds them.
`reached` is the floor's share of the time taken. What is quantized leaves products of two
activations in floating point: with those at their own rate it is `reached_as_quantized`. A variant
is proved active by its engine's name, the types of operations in the graph that it runs, and how
often the transformer was called.

Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import peak
from benchmarks.captions import captions
from benchmarks.floors import Least, Limits, floors_of, work_of
from benchmarks.flops import transformer_flops
from benchmarks.machine import before_measuring
from benchmarks.measuring import alternate, ratio, spread
from benchmarks.rates import matmul_rate
from benchmarks.results_file import finish, require_place
from benchmarks.stages import STAGES, Spent, counted, draw
from benchmarks.variants import Variant, listed, variants
from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines import EAGER
from dermaflux.errors import DermaFluxError, EngineError
from dermaflux.pipeline import Pipeline
from dermaflux.request import validate

__all__ = ["matmul_rate", "transformer_flops", "variants"]

WARM_UP: Final = 2


@dataclass(frozen=True)
class Settings:
    """The command line of `benchmarks.latency`."""

    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    checkpoint: Path | None = option("weights for eager torch, to compare with", None)
    tier: tuple[str, ...] = option("comma-separated tiers to measure too", ())
    rounds: int = option("images of each variant that count", 15)
    steps: int | None = option("default: the bundle's", None)
    size: int | None = option("pixels of both sides; default: the bundle's", None)
    batch: int = option("images that are drawn together", 1)
    threads: int | None = option("of an engine; default: all cores", None)
    no_peak: bool = option("leave out the largest memory, a process for each variant", False)
    out: Path | None = option("write the result there too", None)


@dataclass(frozen=True)
class Asked:
    """What every variant draws."""

    bundle: Bundle
    height: int
    width: int
    steps: int
    batch: int

    @classmethod
    def of(cls, bundle: Bundle, settings: Settings) -> Asked:
        """What the options say, the bundle's defaults for the rest.

        Raises:
            DermaFluxError: the bundle does not take it.
        """
        if settings.batch > bundle.limits.max_batch:
            raise DermaFluxError(
                f"--batch {settings.batch} is more than the bundle's limit; use 1 to "
                f"{bundle.limits.max_batch}"
            )
        steps, size = settings.steps, settings.size
        rules = (bundle.defaults, bundle.limits, bundle.model)
        one = validate(*rules, captions(1)[0], 0, steps, None, size, size)
        return cls(bundle, one.height, one.width, one.steps, settings.batch)

    def draw(self, pipeline: Pipeline, number: int) -> Spent:
        """The batch of a round: other prompts and seeds than those of every other round."""
        prompts = captions(self.batch, seed=number)
        requests = [
            pipeline.request(
                prompt, seed=number * self.batch + row, steps=self.steps,
                height=self.height, width=self.width,
            )
            for row, prompt in enumerate(prompts)
        ]  # fmt: skip
        return draw(pipeline, requests)[0]


def measure(
    pipelines: Mapping[str, Pipeline], asked: Asked, rounds: int
) -> tuple[dict[str, list[Spent]], dict[str, float]]:
    """The rounds that count of every variant, in turn; and seconds of each one's first image."""
    rows: dict[str, list[Spent]] = {name: [] for name in pipelines}

    def side(name: str, number: int) -> None:
        rows[name].append(asked.draw(pipelines[name], number))

    sides: dict[str, Callable[[int], object]] = {name: partial(side, name) for name in pipelines}
    alternate(sides, rounds, WARM_UP)
    first = {name: spent[0].total for name, spent in rows.items()}
    return {name: spent[WARM_UP:] for name, spent in rows.items()}, first


def summary(
    rows: Mapping[str, Sequence[Spent]], floors: Mapping[str, Mapping[str, Least]]
) -> dict[str, dict[str, Any]]:
    """Medians in ms by stage, percentiles, the ratio to eager, the share of each floor reached.

    `floors` are by variant and stage, of one call: `denoise` has one call a step.
    """
    table: dict[str, dict[str, Any]] = {}
    for name, spent in rows.items():
        stages = {stage: [one.seconds[stage] for one in spent] for stage in STAGES}
        stages["encode"] = [sum(one.seconds[stage] for stage in STAGES[:3]) for one in spent]
        stages["total"] = [one.total for one in spent]
        medians = {stage: statistics.median(seconds) for stage, seconds in stages.items()}
        later = [step for one in spent for step in one.steps[1:]]
        figures: dict[str, Any] = {f"{stage}_ms": _ms(value) for stage, value in medians.items()}
        figures["total_p90_ms"] = spread(stages["total"])["p90_ms"]
        figures["percentiles"] = {
            **{stage: spread(seconds) for stage, seconds in stages.items()},
            "first_step": spread([one.steps[0] for one in spent]),
            **({"later_steps": spread(later)} if later else {}),
        }
        figures["steps_ms"] = [
            _ms(statistics.median(step)) for step in zip(*(one.steps for one in spent), strict=True)
        ]
        # Fewer than there are steps, where some are forecast.
        called = statistics.median(
            len(one.steps) if one.calls is None else one.calls for one in spent
        )
        figures["transformer_calls"] = called
        calls = {"denoise": called}
        figures["floors"] = {
            stage: floor.share(medians[stage], calls.get(stage, 1))
            for stage, floor in floors.get(name, {}).items()
        }
        if EAGER in rows:
            found = ratio([one.total for one in rows[EAGER]], stages["total"])
            figures["times_eager"] = round(found.median, 3)
            figures["times_eager_95"] = [round(found.low, 3), round(found.high, 3)]
        table[name] = figures
    return table


def proof(pipeline: Pipeline, bundle: Bundle) -> dict[str, Any]:
    """By part: the engine that runs, its precision, and what the bundle knows of the graph that
    this engine executes: operations by kind and type, counted at the export."""
    parts: dict[str, Any] = {}
    for name in GENERATOR_PARTS:
        engine = pipeline.engines[name]
        file = bundle.parts[name].files.get(engine.precision)
        counted = {} if file is None else file.quantized_ops.get(engine.name, {})
        parts[name] = {"engine": engine.name, "precision": engine.precision, "quantized": counted}
    return parts


def peak_mb(variant: Variant, asked: Asked, checkpoint: Path | None, threads: int | None) -> float:
    """The most memory of `python -m dermaflux generate` with the same engines, in MB.

    Raises:
        EngineError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *variant.words(asked.bundle, checkpoint, threads),
            *("--prompt", captions(1)[0], "--seed", "0", "--count", str(asked.batch)),
            *("--steps", str(asked.steps), "--height", str(asked.height)),
            *("--width", str(asked.width), "--out", folder),
        ]
        command = [sys.executable, "-m", "dermaflux", "generate", *words]
        return round(peak.peak_of(command) / 1e6, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the result is the last line of stdout."""
    settings = parsed(Settings, "python -m benchmarks.latency", __doc__.split("\n\n")[0], arguments)
    words = sys.argv[1:] if arguments is None else arguments
    return ended(lambda: run(settings, words))


def run(settings: Settings, words: Sequence[str]) -> None:
    """What the command does; `words` are those of its command line.

    Raises:
        DermaFluxError: an option is out of range, or the bundle, an engine or a tier cannot be had.
    """
    at_least(settings, dict.fromkeys(("rounds", "batch", "threads", "steps", "size"), 1))
    require_place(settings.out)
    bundle = Bundle.open(settings.bundle)
    asked = Asked.of(bundle, settings)
    before = before_measuring()
    chosen = listed(bundle, settings.checkpoint, settings.tier)
    if not chosen:
        raise EngineError("no engine can run the transformer here; the lines above say why")
    pipelines: dict[str, Pipeline] = {}
    opening: dict[str, float] = {}
    for one in chosen:
        began = time.perf_counter()
        pipeline = one.pipeline(bundle, settings.checkpoint, settings.threads)
        opening[one.name] = time.perf_counter() - began
        pipelines[one.name] = counted(pipeline)
    limits = Limits.measured()
    work = work_of(bundle, GENERATOR_PARTS, asked.batch, asked.height, asked.width)
    rows, first = measure(pipelines, asked, settings.rounds)
    floors = {
        name: floors_of(bundle, pipeline.engines, work, limits)
        for name, pipeline in pipelines.items()
    }
    table = summary(rows, floors)
    for one in chosen:
        row = table[one.name]
        row |= {"open_ms": _ms(opening[one.name]), "first_image_ms": _ms(first[one.name]),
                "parts": proof(pipelines[one.name], bundle)}  # fmt: skip
        if "transformer" in work:
            row["floor_reached"] = round(
                asked.steps * work["transformer"].flops / limits.rates["fp32"]
                / (row["denoise_ms"] / 1e3), 3,
            )  # fmt: skip
    pipelines.clear()
    if not settings.no_peak:
        for one in chosen:
            print(f"the largest memory of {one.name}", file=sys.stderr)
            table[one.name]["peak_mb"] = peak_mb(one, asked, settings.checkpoint, settings.threads)
    step = work.get("transformer")
    result = {
        "environment": before,
        "size": [asked.height, asked.width],
        "steps": asked.steps,
        "batch": asked.batch,
        "rounds": settings.rounds,
        "floor": {
            **({} if step is None else {
                "transformer_gflop": round(asked.steps * step.flops / 1e9, 2),
                "denoise_ms": _ms(asked.steps * step.flops / limits.rates["fp32"]),
            }),
            "matmul_gflops": round(limits.rates["fp32"] / 1e9, 1),
            **limits.told(),
            "gflop": {name: {key: round(value / 1e9, 4) for key, value in asdict(one).items()}
                      for name, one in work.items()},
        },
        "variants": table,
    }  # fmt: skip
    finish("latency", result, words, settings.out, bundle)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    sys.exit(main())
