"""Prometheus metrics of our own, beside BentoML's: by route and stage, with bounded labels.

Labels are route templates, status codes, stages and outcomes; never a path, a prompt or a seed.
Made at start-up, not at import: with several workers prometheus_client has to see the folder
that BentoML names in the worker's environment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Stage = Literal["wait", "encode", "step", "forecast", "decode", "write", "read_image", "classify"]
"""Of a generation: in the queue, its text, one step of a batch (`forecast` where none of its images
had it computed), latents to pixels, the file."""
Outcome = Literal["done", "cancelled", "deadline", "failed"]

# From a classified photograph on a GPU to a large image on a CPU.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """Counters and histograms in one registry; a test hands in its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "dermaflux_requests_total",
            "Requests by route template and status.",
            ["route", "status"],
            registry=registry,
        )
        self._stages = Histogram(
            "dermaflux_stage_seconds",
            "Time spent in one stage of a request.",
            ["stage"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._generations = Counter(
            "dermaflux_generations_total", "Images by outcome.", ["outcome"], registry=registry
        )
        self._steps = Counter(
            "dermaflux_steps_total",
            "Steps of images, computed or forecast (tier cached).",
            ["how"],
            registry=registry,
        )
        self._batches = Histogram(
            "dermaflux_batch_size",
            "Images that one denoising step moved together.",
            buckets=BATCHES,
            registry=registry,
        )
        # Of all workers that live: each of them has a queue of its own.
        self._waiting, self._running = (
            Gauge(
                f"dermaflux_images_{name}",
                words,
                registry=registry,
                multiprocess_mode="livesum",
            )
            for name, words in (
                ("waiting", "Images in the queue now."),
                ("running", "Images that are drawn now."),
            )
        )
        self._decisions = Counter(
            "dermaflux_decisions_total",
            "Classifications by decision; a drift here is a reason to look.",
            ["decision"],
            registry=registry,
        )

    def request(self, route: str, status: int) -> None:
        """Count one reply of the route template `route`."""
        self._requests.labels(route, str(status)).inc()

    def took(self, stage: Stage, seconds: float) -> None:
        """Record the duration of one stage."""
        self._stages.labels(stage).observe(seconds)

    def generation(self, outcome: Outcome, images: int = 1) -> None:
        """Count images that were taken into the queue, at their end."""
        self._generations.labels(outcome).inc(images)

    def decision(self, decision: str) -> None:
        """Count one classification."""
        self._decisions.labels(decision).inc()

    def step(self, seconds: float, computed: int, forecast: int) -> None:
        """Record one step of a batch, and for how many of its images it was computed."""
        self.took("step" if computed else "forecast", seconds)
        self._steps.labels("computed").inc(computed)
        self._steps.labels("forecast").inc(forecast)

    def batch(self, images: int) -> None:
        """Record how many images one step moved."""
        self._batches.observe(images)

    def queue(self, waiting: int, running: int) -> None:
        """Say how many images wait and are drawn now."""
        self._waiting.set(waiting)
        self._running.set(running)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Record how long the block takes, also when it raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.took(stage, time.monotonic() - start)
