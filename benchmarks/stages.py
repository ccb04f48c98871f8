"""One batch of images in process, every stage by its own clock.

    >>> spent, pictures = draw(pipeline, requests)
    >>> spent.seconds["decode"], spent.steps
    (0.022, (0.0081, 0.0062, 0.0062, ...))

The stages are the pipeline's own: its tokenizers, engines and loop. Nothing is kept from one call
to the next, so each prompt is encoded as if it were new. `counted(pipeline)` also counts how often
the transformer was called: fewer times than there are steps, where steps are forecast.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.counting import Counted
from dermaflux.decode import Pixels
from dermaflux.denoise import Text
from dermaflux.images import encode_png
from dermaflux.pipeline import Pipeline, Request

STAGES: Final = ("tokenize", "text_encoder", "text_encoder_2", "denoise", "decode", "png")
"""In order; their sum is the total."""


@dataclass(frozen=True)
class Spent:
    """Seconds by stage, and those of every step of `denoise`, in order: the first has also what is
    done once per request. `calls` of the transformer, where the pipeline is `counted`."""

    seconds: Mapping[str, float]
    steps: tuple[float, ...]
    calls: int | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def counted(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, whose transformer counts its calls from now on; engines that take turns in
    memory are left alone."""
    if isinstance(pipeline.engines, dict):
        engine = Counted(pipeline.engines["transformer"])
        pipeline.engines = {**pipeline.engines, "transformer": engine}
    return pipeline


def draw(pipeline: Pipeline, requests: Sequence[Request]) -> tuple[Spent, list[Pixels]]:
    """Requests of one size as one batch: what each stage took, and the images.

    Raises:
        EngineError: an engine failed.
    """
    prompts = [request.prompt for request in requests]
    with pipeline.turn():
        marks = [time.perf_counter()]
        ids = [pipeline.tokenizers[name].ids(prompts) for name in ("tokenizer", "tokenizer_2")]
        marks.append(time.perf_counter())
        clip = pipeline.engines["text_encoder"].run({"input_ids": ids[0]})
        marks.append(time.perf_counter())
        t5 = pipeline.engines["text_encoder_2"].run({"input_ids": ids[1]})
        marks.append(time.perf_counter())
        before = _calls(pipeline)
        ends: list[float] = []
        latents = pipeline.denoise(
            np.stack([pipeline.start(request) for request in requests]),
            Text(t5["last_hidden_state"], clip["pooler_output"]),
            steps=[request.steps for request in requests],
            guidance=[request.guidance for request in requests],
            on_step=lambda *_: ends.append(time.perf_counter()),
        )
        marks.append(time.perf_counter())
        pictures = pipeline.decode(latents)
        marks.append(time.perf_counter())
    for request, pixels in zip(requests, pictures, strict=True):
        encode_png(pixels, pipeline.record(request))
    marks.append(time.perf_counter())
    spent = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    began = marks[STAGES.index("denoise")]
    steps = tuple(end - start for start, end in zip([began, *ends], ends, strict=False))
    after = _calls(pipeline)
    calls = None if before is None or after is None else after - before
    return Spent(dict(zip(STAGES, spent, strict=True)), steps, calls), pictures


def _calls(pipeline: Pipeline) -> int | None:
    if not isinstance(pipeline.engines, dict):
        return None
    engine = pipeline.engines["transformer"]
    return engine.calls if isinstance(engine, Counted) else None
