"""Batches: what drawing several pictures at once gains, ours beside a plain loop of diffusers.

    >>> with batches(bundle, Path("models/mini"), task, limits, threads=2, sizes=(1, 4)) as ladder:
    ...     rows = climb(ladder.rungs, effort, ladder.floor, alike)

The baseline is diffusers' pipeline called for one picture after the other. Its own batches are a
list of prompts with as many latents; ours are `Pipeline`'s. All figures are of one picture. The
batch generator itself is measured beside the bare pipeline by `benchmarks.batch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.floors import Limits
from benchmarks.ladder import Ladder
from benchmarks.ladder_generation import floor_of, our_rung, rival
from benchmarks.rivals import flux_torch
from benchmarks.rivals.task import Task
from dermaflux.bundle import Bundle
from dermaflux.pipeline import Pipeline

SIZES: Final = (1, 2, 4, 8)


@contextmanager
def batches(
    bundle: Bundle, checkpoint: Path, task: Task, limits: Limits, threads: int,
    sizes: Sequence[int] = SIZES,
) -> Iterator[Ladder]:  # fmt: skip
    """The ladder, open for as long as the block lasts; sizes that the bundle does not take are
    left out.

    Raises:
        EngineError: diffusers cannot open the checkpoint, or no engine runs the bundle.
    """
    base = flux_torch.eager(checkpoint, threads)
    pipeline = Pipeline.open(bundle, threads=threads)
    most = pipeline.batch(task.height, task.width)
    taken = [size for size in sizes if size <= most]
    ladder = Ladder([], floor_of(bundle, task, limits))
    first = f"diffusers, {taken[0]}"
    for size in taken:
        name = f"diffusers, {size}"
        words = "a plain loop" if size == 1 else f"{size} prompts and {size} latents a call"
        ladder.add(name, partial(rival, name, words, lambda: base, task, size, before=first,
                                 reference=name))  # fmt: skip
    precision = pipeline.engines["transformer"].precision
    for size in taken:
        name = f"ours, {size}"
        words = f"{pipeline.engines['transformer'].name} {precision}, {size} at once"
        ladder.add(name, partial(our_rung, name, words, lambda: pipeline, task, size,
                                 before=f"diffusers, {size}", reference=f"diffusers, {size}",
                                 precision=precision))  # fmt: skip
    for size in sizes:
        if size not in taken:
            ladder.left_out[f"{size} at once"] = f"the bundle takes {most} at once"
    yield ladder
