"""What the rows of `benchmarks.gpu` share: sides, floors, and how an image is timed.

>>> drawn(bench, image, "fp8", lambda: sides.draw(engine, image))
{"seconds": [1.9, 1.9, 1.9], "median_s": 1.9, "floor_s": 1.6, "percent_of_floor": 84.0, ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.flops import transformer_flops
from benchmarks.gpu_shapes import Image
from benchmarks.gpu_sides import FP8, Sides
from dermaflux.flow import Floats


@dataclass
class Bench:
    """Sides, and what was found so far that later rows refer to."""

    sides: Sides
    rates: dict[str, float | None] = field(default_factory=dict)
    first: Floats | None = None
    """Diffusers' velocity at the first step of the dev image."""
    final: Floats | None = None
    """Diffusers' latents of the dev image."""

    @property
    def device(self) -> torch.device:
        return self.sides.device

    def floor(self, image: Image, tier: str) -> float | None:
        """The least seconds of an image's transformer: operations over the rates measured here.

        In fp8 linear layers have the rate of fp8, attention that of bf16.
        """
        shape = self.sides.shape
        tokens = shape.tokens(image)
        total = transformer_flops(shape.transformer, tokens, image.text)
        layers = shape.transformer["num_layers"] + shape.transformer["num_single_layers"]
        d = shape.transformer["num_attention_heads"] * shape.transformer["attention_head_dim"]
        attention = 4 * layers * (tokens + image.text) ** 2 * d
        bf16 = self.rates.get("bf16")
        low = self.rates.get("fp8") if tier == FP8 else bf16
        if bf16 is None or low is None:
            return None
        return float(image.steps * ((total - attention) / low + attention / bf16))


@dataclass(frozen=True)
class Row:
    """One thing to measure, and the seconds that it may take on a card."""

    name: str
    estimate: float
    measure: Callable[[Bench], dict[str, Any]]


def drawn(bench: Bench, image: Image, tier: str, draw: Callable[[], Any]) -> dict[str, Any]:
    """The first call, then rounds: seconds, ms a step, floor, percent of it, and the goal of the
    whole image."""
    began = time.perf_counter()
    draw()
    first = time.perf_counter() - began
    seconds = []
    for _ in range(bench.sides.shape.rounds):
        began = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    floor = bench.floor(image, tier)
    return {
        "image": image.name,
        "steps": image.steps,
        "first_s": first,
        "seconds": seconds,
        "median_s": median,
        "ms_per_step": 1e3 * median / image.steps,
        "floor_s": floor,
        "percent_of_floor": None if floor is None else 100 * floor / median,
        "goal_s": image.goals.get(tier),
    }
