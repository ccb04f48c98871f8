"""The ladder of generation: one picture from its prompt to its PNG, by everyone who can draw it.

    >>> with generation(bundle, Path("models/mini"), Task.of(bundle), limits, Options()) as ladder:
    ...     rows = climb(ladder.rungs, effort, ladder.floor, alike)

Rivals first, diffusers eager in fp32 being the baseline; then ours, a technique a row: the same
graphs in plain sessions, our engine, OpenVINO, 8 bits, a text that is known already, tiers. What
cannot run here is left out with a sentence. Ours are measured through the stages of
`benchmarks.stages`, which are the pipeline's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.floors import Limits, work_of
from benchmarks.flops import Work, weights
from benchmarks.ladder import Floors, Ladder, Made, Rung
from benchmarks.ladder_evidence import counted, evidence_of
from benchmarks.rivals import flux_optimum, flux_torch, sessions
from benchmarks.rivals.flux_torch import Rival
from benchmarks.rivals.task import Asked, Task
from benchmarks.stages import Spent, draw
from dermaflux.bundle import GENERATOR_PARTS, Bundle
from dermaflux.denoise import Text
from dermaflux.engines import OPENVINO, ORT
from dermaflux.golden import psnr
from dermaflux.images import encode_png
from dermaflux.pipeline import Pipeline
from dermaflux.texts import Texts

SAME_DB: Final = 30.0
"""Under it a side has drawn another picture, and its time means nothing."""
EAGER: Final = "diffusers eager fp32"
_TIERS: Final = {"cached": "steps that are foreseen are not computed (labelled in the picture)"}
_TEXT: Final = ("tokenize", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Options:
    """`rounds` at most; rivals of the names in `without` are left out; `tiers` are those that have
    a row beside lossless (fp32 on a CPU) and int8, which have one anyhow."""

    threads: int
    rounds: int = 30
    without: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ("cached",)


def alike(base: NDArray[np.uint8], own: NDArray[np.uint8]) -> dict[str, float]:
    """PSNR in dB between pictures of the same request; `wrong` where another one was drawn."""
    if base.shape != own.shape:
        return {"psnr_db": 0.0, "wrong": 1.0}
    decibels = psnr(own, base)
    return {"psnr_db": decibels, "wrong": float(decibels < SAME_DB)}


@contextmanager
def generation(
    bundle: Bundle, checkpoint: Path, task: Task, limits: Limits, options: Options
) -> Iterator[Ladder]:
    """The ladder, open for as long as the block lasts.

    Raises:
        EngineError: diffusers cannot open the checkpoint: there is no baseline.
    """
    threads = options.threads
    base = flux_torch.eager(checkpoint, threads)
    first = rival(EAGER, "what a user has: FluxPipeline as it comes", lambda: base, task)
    ladder = Ladder([first], floor_of(bundle, task, limits))
    with ExitStack() as stack:
        optimum = partial(flux_optimum.opened, bundle.path, threads)
        theirs: list[tuple[str, str, Callable[[], Rival], dict[str, Any]]] = [
            ("diffusers eager bf16", "weights and activations in bf16",
             partial(flux_torch.eager, checkpoint, threads, "bfloat16"),
             {"precision": "bf16", "lossy": True, "before": EAGER}),
            ("diffusers compiled", "torch.compile around transformer and decoder",
             partial(flux_torch.compiled, checkpoint, threads, task.asked(0)), {"before": EAGER}),
            ("Optimum ORTFluxPipeline", "diffusers' loop, the bundle's fp32 graphs in ONNX Runtime",
             lambda: stack.enter_context(optimum()), {"before": EAGER}),
        ]  # fmt: skip
        for name, technique, opened, more in theirs:
            if name not in options.without:
                ladder.add(name, partial(rival, name, technique, opened, task, **more))
            else:
                ladder.left_out[name] = "left out, as asked: it takes minutes to begin"
        for name, technique, ours, more in _ours(bundle, checkpoint, options):
            ladder.add(name, partial(our_rung, name, technique, ours, task, **more))
        opened_as: dict[str, dict[str, Any]] = {
            "openvino int8": {"engine": OPENVINO, "precision": "int8"},
            **{f"tier {tier}": {"tier": tier} for tier in options.tiers},
        }
        for before, chosen in opened_as.items():
            ladder.add(f"{before}, text known", partial(
                text_known, f"{before}, text known", before, task, options.rounds,
                partial(Pipeline.open, bundle, threads=threads, **chosen),
                lossy="tier" in chosen,
            ))  # fmt: skip
        yield ladder


Opened = Callable[[], Pipeline]


def _ours(
    bundle: Bundle, checkpoint: Path, options: Options
) -> list[tuple[str, str, Opened, dict[str, Any]]]:
    """Name, technique, how to open it, and what more the rung has; in the ladder's order."""
    threads, after = options.threads, {"before": EAGER}
    opened = partial(Pipeline.open, bundle, threads=threads)
    rows: list[tuple[str, str, Opened, dict[str, Any]]] = [
        ("plain onnxruntime fp32", "the graphs in default sessions, our loop in numpy",
         partial(sessions.pipeline_of, bundle, threads), {"ours": False, "before": EAGER}),
        ("torch engine fp32", "our loop and blocks in torch: modulation of all steps at once",
         partial(Pipeline.from_checkpoint, checkpoint, threads=threads, tier="lossless"), after),
        ("onnxruntime fp32", "our session: no spinning threads, the same bits every time",
         partial(opened, engine=ORT, precision="fp32"), {"before": "plain onnxruntime fp32"}),
        ("openvino fp32", "OpenVINO; what stays the same is bound once (tier lossless)",
         partial(opened, engine=OPENVINO, precision="fp32"), {"before": "plain onnxruntime fp32"}),
        ("openvino int8", "products in 8 bits, smoothed and calibrated (tier int8)",
         partial(opened, engine=OPENVINO, precision="int8"),
         {"before": "openvino fp32", "precision": "int8"}),
    ]  # fmt: skip
    for tier in options.tiers:
        rows.append((f"tier {tier}", _TIERS.get(tier, "what it chooses on this machine"),
                     partial(opened, tier=tier),
                     {"precision": "int8", "lossy": True, "before": "openvino int8"}))  # fmt: skip
    return rows


def rival(
    name: str, technique: str, opened: Callable[[], Rival], task: Task, images: int = 1, **more: Any
) -> Rung:
    """A rung that somebody else's pipeline draws."""
    one = opened()

    def make(number: int) -> Made:
        drawn = one.draw(task.asked(number, images))
        return Made(drawn.pixels, drawn.stages, drawn.seconds)

    return Rung(
        name, technique, make, images=images, opened_s=one.opened_s, evidence=one.evidence, **more
    )


def our_rung(
    name: str, technique: str, opened: Opened, task: Task, images: int = 1, *, ours: bool = True,
    **more: Any,
) -> Rung:  # fmt: skip
    """A rung that our pipeline draws, stage by stage."""
    began = time.perf_counter()
    pipeline = opened()
    opened_s = time.perf_counter() - began

    def make(number: int) -> Made:
        spent, pictures = draw(pipeline, requests(pipeline, task.asked(number, images)))
        return Made(np.stack(pictures), told(spent))

    counters = counted(pipeline)
    return Rung(name, technique, make, ours=ours, images=images, opened_s=opened_s,
                evidence=lambda: evidence_of(counters), **more)  # fmt: skip


def text_known(
    name: str, before: str, task: Task, rounds: int, opened: Opened, lossy: bool = False
) -> Rung:
    """On texts that were encoded before, as the service and the batch generator keep them."""
    pipeline = opened()
    texts = Texts(pipeline)
    for number in range(rounds):
        texts.of(task.asked(number).prompts)
    counters = counted(pipeline)

    def make(number: int) -> Made:
        wanted = requests(pipeline, task.asked(number))
        marks = [time.perf_counter()]
        rows = texts.of([one.prompt for one in wanted])
        text = Text(*(np.concatenate([getattr(row, one) for row in rows])
                      for one in ("embeddings", "pooled")))  # fmt: skip
        marks.append(time.perf_counter())
        latents = pipeline.denoise(
            np.stack([pipeline.start(one) for one in wanted]), text,
            steps=[one.steps for one in wanted], guidance=[one.guidance for one in wanted],
        )  # fmt: skip
        marks.append(time.perf_counter())
        pictures = pipeline.decode(latents)
        marks.append(time.perf_counter())
        for one, pixels in zip(wanted, pictures, strict=True):
            encode_png(pixels, pipeline.record(one))
        marks.append(time.perf_counter())
        spent = [after - before for before, after in zip(marks, marks[1:], strict=False)]
        return Made(
            np.stack(pictures),
            dict(zip(("text", "denoise", "decode", "png"), spent, strict=True)),
        )

    return Rung(name, "its prompt is not new: both encoders are skipped", make, ours=True,
                precision="int8", lossy=lossy, before=before,
                evidence=lambda: evidence_of(counters))  # fmt: skip


def requests(pipeline: Pipeline, asked: Asked) -> list[Any]:
    """What was asked, as our pipeline takes it: the noise is that of the seeds."""
    return [
        pipeline.request(prompt, seed=seed, steps=asked.steps, guidance=asked.guidance,
                         height=asked.height, width=asked.width)
        for prompt, seed in zip(asked.prompts, asked.seeds, strict=True)
    ]  # fmt: skip


def told(spent: Spent) -> dict[str, float]:
    """Our stages under the names that all sides have."""
    text = sum(spent.seconds[name] for name in _TEXT)
    return {"text": text, **{name: spent.seconds[name] for name in ("denoise", "decode", "png")}}


def floor_of(bundle: Bundle, task: Task, limits: Limits) -> Floors:
    """The floor of a call in the rung's precision, for the pictures that it draws.

    int8 is the transformer's; the other parts are in floating point whatever it is in.
    """
    calls = {"transformer": task.steps}
    counted: dict[int, dict[str, Work]] = {}

    def floor(rung: Rung) -> Mapping[str, Any] | None:
        images, precision = rung.images, rung.precision
        if images not in counted:
            counted[images] = work_of(bundle, GENERATOR_PARTS, images, task.height, task.width)
        if set(counted[images]) != set(GENERATOR_PARTS):
            return None
        seconds = flops = 0.0
        for part, one in counted[images].items():
            kind = "fp32" if precision == "int8" and part != "transformer" else precision
            files = bundle.parts[part].files
            size = weights(bundle, part, kind if kind in files else next(iter(files)))
            least = limits.least(one, size, kind)
            each = least.as_quantized if kind == "int8" else least.seconds
            seconds += calls.get(part, 1) * each
            flops += calls.get(part, 1) * one.flops
        return {"ms": 1e3 * seconds, "precision": precision, "gflop": round(flops / 1e9, 3)}

    return floor
