"""Items in, PNG files and verdicts out: what one process, or one actor of a cluster, does.

In two halves, so that one batch is developed (decoded, judged, encoded) while the next is denoised.
One bad item never fails its neighbours: a batch that fails is made again one by one, and only who
fails alone has failed.

    >>> maker = Maker.open(Tools(bundle=Path("bundles/mini")))
    >>> made = maker.develop(tries, maker.denoise(tries))
    >>> made[0].png[:4], made[0].verdict.reasons
    (b'\\x89PNG', ())
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from dermaflux import forecast
from dermaflux.bundle import Bundle
from dermaflux.classifier import Classifier
from dermaflux.decode import Pixels
from dermaflux.engines import library
from dermaflux.errors import Cancelled, DermaFluxError
from dermaflux.flow import Floats
from dermaflux.hardware import look, processor, usable_cores
from dermaflux.images import encode_png
from dermaflux.pipeline import Pipeline
from dermaflux.request import Request
from dermaflux.thumbnails import Index
from serving.batch.gate import Gate, Thresholds, Verdict
from serving.batch.items import Item

log = logging.getLogger(__name__)
Result = TypeVar("Result")

FAILURES: Final = (DermaFluxError, MemoryError)
"""What an engine raises of an item; whatever else comes up is a mistake of ours, and is shown."""


@dataclass(frozen=True)
class Tools:
    """What items are made with. It can be sent to another machine that has the same folders.

    `gate` is None where nothing is judged; `seen` is an index of pictures that the generator saw.
    """

    bundle: Path
    engine: str | None = None
    precision: str | None = None
    threads: int | None = None
    gate: Thresholds | None = None
    seen: Path | None = None
    tier: str | None = None


@dataclass(frozen=True)
class Try:
    """An item and which try of it this is, from 0; `request` has the try's own seed."""

    item: Item
    attempt: int
    request: Request


@dataclass(frozen=True)
class Made:
    """What became of a try: a PNG and its verdict, or `error`.

    `pixels` is the sha256 of the uint8 [height, width, 3] before marking.
    """

    one: Try
    engine: str
    png: bytes = b""
    pixels: str = ""
    verdict: Verdict = Verdict((), {})
    error: str = ""


class Maker:
    """A pipeline and a gate. `engine` is the hash of what draws, `details` what it stands for."""

    def __init__(
        self, pipeline: Pipeline, gate: Gate | None, details: Mapping[str, Any] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.gate = gate
        self.details = dict(details or {})
        self.engine = _hash(self.details)

    @classmethod
    def open(cls, tools: Tools) -> Maker:
        """Open a bundle and what judges its pictures.

        Raises:
            BundleError, EngineError, DatasetError: one of them cannot be had.
        """
        bundle = Bundle.open(tools.bundle)
        pipeline = Pipeline.open(
            bundle,
            engine=tools.engine,
            precision=tools.precision,
            tier=tools.tier,
            threads=tools.threads,
        )
        gate = None
        threads = tools.threads or usable_cores()
        if tools.gate is not None:
            judge = None
            if tools.gate.agreement != "none" and bundle.classifier is not None:
                # Its own gate is for photographs, and refuses what is smoother than they are.
                judge = Classifier.open(bundle, threads=tools.threads, gated=False)
            seen = None if tools.seen is None else Index.load(tools.seen)
            gate = Gate(tools.gate, judge, seen)
        return cls(pipeline, gate, _details(bundle, pipeline, threads))

    @property
    def in_turns(self) -> bool:
        """Whether the parts take turns in memory: then halves of two batches cannot overlap."""
        return self.pipeline.plan is not None and self.pipeline.plan.in_turns

    def denoise(
        self, tries: Sequence[Try], cancelled: Callable[[], bool] | None = None
    ) -> list[Floats | str]:
        """Latents float32 [C, h, w] of each try, or why there are none.

        Raises:
            Cancelled: the caller asked to stop.
        """
        requests = [one.request for one in tries]

        def run(rows: Sequence[int]) -> list[Floats]:
            return self.pipeline.latents([requests[row] for row in rows], cancelled=cancelled)

        return _isolated(run, len(tries))

    def develop(self, tries: Sequence[Try], latents: Sequence[Floats | str]) -> list[Made]:
        """Latents to PNG files with verdicts, in the order of the tries."""
        images: dict[int, Pixels | str] = {
            row: one for row, one in enumerate(latents) if isinstance(one, str)
        }
        there = [row for row in range(len(tries)) if row not in images]

        def run(rows: Sequence[int]) -> list[Pixels]:
            chosen = [latents[there[row]] for row in rows]
            return self.pipeline.develop([one for one in chosen if not isinstance(one, str)])

        images.update(zip(there, _isolated(run, len(there)), strict=True))
        good = [row for row in there if not isinstance(images[row], str)]
        verdicts = dict(zip(good, self._judged([tries[row] for row in good], [
            one for row in good if not isinstance(one := images[row], str)
        ]), strict=True))  # fmt: skip
        return [self._made(one, images[row], verdicts.get(row)) for row, one in enumerate(tries)]

    def _judged(self, tries: Sequence[Try], images: Sequence[Pixels]) -> list[Verdict | str]:
        if self.gate is None:
            return [Verdict((), {}) for _ in tries]
        gate = self.gate

        def run(rows: Sequence[int]) -> list[Verdict]:
            return gate.judge([tries[row].item for row in rows], [images[row] for row in rows])

        return _isolated(run, len(tries))

    def _made(self, one: Try, image: Pixels | str, verdict: Verdict | str | None) -> Made:
        if isinstance(image, str) or verdict is None:
            return Made(one, self.engine, error=str(image))
        if isinstance(verdict, str):
            return Made(one, self.engine, error=verdict)
        pixels = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
        png = encode_png(image, self.pipeline.record(one.request))
        return Made(one, self.engine, png, pixels, verdict)


def _isolated(run: Callable[[Sequence[int]], Sequence[Result]], count: int) -> list[Result | str]:
    """`run` over rows 0 to count - 1: together, or each alone where together they fail."""
    if not count:
        return []
    try:
        return list(run(range(count)))
    except Cancelled:
        raise
    except FAILURES as error:
        if count == 1:
            return [_words(error)]
        log.info("a batch of %d failed (%s); each is tried alone", count, _words(error))
    return [one for row in range(count) for one in _isolated(partial(_alone, run, row), 1)]


def _alone(
    run: Callable[[Sequence[int]], Sequence[Result]], row: int, _: Sequence[int]
) -> Sequence[Result]:
    return run([row])


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _details(bundle: Bundle, pipeline: Pipeline, threads: int) -> dict[str, Any]:
    """What decides the pixels beside the request: files, engines, their versions, the machine, and
    a tier that forecasts steps, with its bounds.

    Threads are among it: they cut long sums into as many parts, which changes the last bits.
    """
    choices = pipeline.choices
    machine = look()
    return {
        "bundle": bundle.id,
        "parts": {
            part: {
                "engine": choice.engine,
                "precision": choice.precision,
                "file": bundle.parts[part].files[choice.precision].sha256,
            }
            for part, choice in choices.items()
        },
        "libraries": {
            name: str(getattr(importlib.import_module(name), "__version__", "?"))
            for name in sorted({library(choice.engine)[0] for choice in choices.values()})
        },
        "processor": processor(),
        "threads": threads,
        "gpus": [gpu.name for gpu in machine.gpus],
        **({"forecast": forecast.BOUNDS} if pipeline.forecasts else {}),
    }


def _hash(details: Mapping[str, Any]) -> str:
    text = json.dumps(details, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
