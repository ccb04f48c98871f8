"""The rows of `benchmarks.gpu`, the most valuable first: each measures one thing, in seconds.

>>> bench = Bench(Sides(...))
>>> for row in ROWS:
...     result = row.measure(bench)     # {"seconds": [2.71, 2.70], "floor_s": 2.4, ...}

`estimate` is what a row takes on an H200 with FLUX.1's shapes, compilation included: guesses until
one has run. They decide what still fits, so they are on the long side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch

from benchmarks.counting import Counted
from benchmarks.gpu_bench import Bench, Row, drawn
from benchmarks.gpu_parts import classifier, decoder, text_encoders
from benchmarks.gpu_proof import attentions, differences, profiled, rates
from benchmarks.gpu_sides import CACHED, FP8, LOSSLESS
from benchmarks.measuring import alternate, ratio
from dermaflux.engines.flux_engine import FluxEngine
from dermaflux.engines.flux_graph import Blocks

DEV: Final = "dev 1024"
_LADDER_STEPS: Final = 4


def _rates(bench: Bench) -> dict[str, Any]:
    shape = bench.sides.shape
    bench.rates = rates(bench.device, shape.matrix, shape.copied)
    image = shape.image(DEV)
    return {
        "flops_bf16": bench.rates["bf16"],
        "flops_fp8": bench.rates["fp8"],
        "bytes_per_second": bench.rates["bytes"],
        "attention_flops": attentions(
            bench.device,
            shape.tokens(image) + image.text,
            shape.transformer["num_attention_heads"],
            shape.transformer["attention_head_dim"],
        ),
    }


def _eager(bench: Bench) -> dict[str, Any]:
    image = bench.sides.shape.image(DEV)
    bench.first = bench.sides.first_with_diffusers(image)

    def draw() -> None:
        bench.final = bench.sides.draw_with_diffusers(image)

    return drawn(bench, image, LOSSLESS, draw)


def _ours(tier: str, name: str) -> Callable[[Bench], dict[str, Any]]:
    def measure(bench: Bench) -> dict[str, Any]:
        sides = bench.sides
        image = sides.shape.image(name)
        engine = sides.engine(tier, image.guided)
        before = engine.counts()
        latents = []
        result = drawn(bench, image, tier, lambda: latents.append(sides.draw(engine, image)))
        result["counts"] = engine.counts()
        result["compiles_of_this_image"] = result["counts"]["compiles"] - before["compiles"]
        step = sides.step(engine, image)
        if name == DEV and bench.first is not None and bench.final is not None:
            result["velocity_against_eager"] = differences(step(), bench.first)
            result["latents_against_eager"] = differences(latents[-1], bench.final)
        step()
        result["profile_of_a_step"] = profiled(step, bench.device)
        if bench.device.type == "cuda":
            result["peak_gb"] = torch.cuda.max_memory_allocated(bench.device) / 1e9
        return result

    return measure


def _alternated(bench: Bench) -> dict[str, Any]:
    """Eager and ours in turn within rounds: what ratios are of."""
    sides, image = bench.sides, bench.sides.shape.image(DEV)
    engines = {tier: sides.engine(tier, image.guided) for tier in (LOSSLESS, FP8)}
    draws: dict[str, Callable[[int], object]] = {
        "diffusers eager": lambda _: sides.draw_with_diffusers(image)
    }
    for tier, engine in engines.items():
        draws[tier] = lambda _, engine=engine: sides.draw(engine, image)  # type: ignore[misc]
    seconds = alternate(draws, sides.shape.rounds, warm_up=0)
    ratios = {name: vars(ratio(seconds["diffusers eager"], each)) for name, each in seconds.items()}
    return {"seconds": seconds, "times_diffusers_eager": ratios}


def _ladder(bench: Bench) -> dict[str, Any]:
    """A technique a rung, each with those before it: ms a step over a few steps, in bf16."""
    sides, image = bench.sides, bench.sides.shape.image(DEV)
    engines = {
        "fused layers; modulation, text and positions once": sides.variant(
            LOSSLESS, image.guided, None, None
        ),
        "blocks compiled": sides.variant(LOSSLESS, image.guided, Blocks(sides.backend), None),
        "one graph a forward": sides.engine(LOSSLESS, image.guided),
        "layers in fp8": sides.engine(FP8, image.guided),
    }
    rungs: dict[str, Callable[[int], object]] = {}
    if bench.first is not None:
        rungs["diffusers eager"] = lambda _: sides.draw_with_diffusers(image, _LADDER_STEPS)
    for name, engine in engines.items():
        rungs[name] = partial(_few, bench, engine)
    seconds = alternate(rungs, sides.shape.rounds, warm_up=1)
    return {
        "ms_per_step": {
            name: 1e3 * statistics.median(each) / _LADDER_STEPS for name, each in seconds.items()
        }
    }


def _few(bench: Bench, engine: FluxEngine, _: int) -> object:
    return bench.sides.draw(engine, bench.sides.shape.image(DEV), _LADDER_STEPS)


def _cached(bench: Bench) -> dict[str, Any]:
    """Steps forecast (`dermaflux.forecast`) over fp8. How many depends on the velocity's curve, and
    random weights have another than trained ones: beside what was drawn stands what half of the
    steps would take, the embedded default's share."""
    sides, image = bench.sides, bench.sides.shape.image(DEV)
    engine = Counted(sides.engine(FP8, image.guided))

    def draw() -> None:
        engine.calls = 0
        sides.draw(engine, image, forecasts=True)

    result = drawn(bench, image, CACHED, draw)
    calls = engine.calls
    began = time.perf_counter()
    sides.draw(engine, image)
    plain = time.perf_counter() - began
    result |= {"transformer_calls": calls, "plain_fp8_s": plain}
    if calls < image.steps:
        # A line through both runs: a call less saves this much.
        per_call = (plain - result["median_s"]) / (image.steps - calls)
        result["if_half_were_computed_s"] = plain - per_call * (image.steps // 2)
    return {**result, "floor_s": None, "percent_of_floor": None}


def _seam(bench: Bench) -> dict[str, Any]:
    """What numpy at every step costs: a step of the loop beside the kernels of a forward."""
    sides, image = bench.sides, bench.sides.shape.image(DEV)
    engine = sides.engine(LOSSLESS, image.guided)
    inside = profiled(sides.step(engine, image), bench.device)["all_ms"]
    began = time.perf_counter()
    sides.draw(engine, image)
    whole = 1e3 * (time.perf_counter() - began) / image.steps
    return {"ms_per_step": whole, "ms_of_kernels": inside, "ms_of_the_rest": whole - inside}


def _compiled_diffusers(bench: Bench) -> dict[str, Any]:
    image = bench.sides.shape.image(DEV)
    bench.sides.compile_diffusers()
    return drawn(bench, image, LOSSLESS, lambda: bench.sides.draw_with_diffusers(image))


ROWS: Final = (
    Row("rates", 15, _rates),
    Row(f"diffusers eager, {DEV}", 45, _eager),
    Row(f"lossless, {DEV}", 80, _ours(LOSSLESS, DEV)),
    Row(f"fp8, {DEV}", 80, _ours(FP8, DEV)),
    Row(f"eager, lossless and fp8 in turn, {DEV}", 40, _alternated),
    Row("decoder", 60, decoder),
    Row(f"cached, {DEV}", 20, _cached),
    Row("lossless, schnell 1024", 40, _ours(LOSSLESS, "schnell 1024")),
    Row("fp8, schnell 1024", 40, _ours(FP8, "schnell 1024")),
    Row("lossless, schnell 512", 40, _ours(LOSSLESS, "schnell 512")),
    Row("fp8, schnell 512", 40, _ours(FP8, "schnell 512")),
    Row("classifier", 60, classifier),
    Row("a technique a rung", 60, _ladder),
    Row("what the seam costs", 15, _seam),
    Row("text encoders", 30, text_encoders),
    Row(f"diffusers, blocks compiled, {DEV}", 80, _compiled_diffusers),
)
