"""The ladder of classification: a batch of prepared pictures to logits, by everyone who can.

    >>> with judged(bundle, Path("runs/b16"), rates, Options(threads=2, batch=8)) as ladder:
    ...     rows = climb(ladder.rungs, effort, ladder.floor, same_answers)

timm's model on torch is the baseline, then what a user would do next (bf16, torch.compile, plain
ONNX Runtime), then ours, a precision a row. Pictures are prepared before the clock runs, and each
side gets the same numbers; ours answers through `Classifier.judge`, as the service asks it, without
the gate, which looks at the picture and not at the model. Decoding and resizing of photographs is
measured over HTTP (`benchmarks.http_classify`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.floors import Limits
from benchmarks.flops import Work
from benchmarks.ladder import Floors, Ladder, Made, Rung
from benchmarks.ladder_evidence import evidence_of
from benchmarks.rivals import sessions, vit_torch
from benchmarks.rivals.vit_torch import Judge
from dermaflux.bundle import Bundle, ClassifierSpec
from dermaflux.classifier import Classifier, Prepared, preprocess
from dermaflux.engines import OPENVINO, ORT
from dermaflux.errors import BundleError
from dermaflux.flow import Floats

EAGER: Final = "timm eager fp32"
COMPILED: Final = "timm compiled"
SAME: Final = 0.1
"""Change of a probability above which a side judges with another model."""
PRUNED: Final = "int8-pruned"
_PHOTOGRAPH: Final = (600, 450)
"""Pixels of a dermoscopic photograph as the public collections have them."""
_TECHNIQUES: Final[Mapping[str, str]] = {
    "fp32": "the graph in OpenVINO",
    "bf16": "bf16 where the processor has products of it",
    "int8": "products in 8 bits, calibrated",
    PRUNED: "patches that say the same are merged on the way: less work, other answers",
}


@dataclass(frozen=True)
class Options:
    """`batch` pictures a call; rivals of the names in `without` are left out."""

    threads: int
    batch: int = 8
    without: tuple[str, ...] = ()


@contextmanager
def judged(bundle: Bundle, checkpoint: Path, limits: Limits, options: Options) -> Iterator[Ladder]:
    """The ladder, open for as long as the block lasts.

    Raises:
        BundleError: the bundle has no classifier, or the checkpoint's is another.
        EngineError: timm cannot open the checkpoint: there is no baseline.
    """
    spec = bundle.classifier
    if spec is None:
        raise BundleError(
            f"the bundle {bundle.name} has no classifier; name another one with --classifier-bundle"
        )
    pixels = photographs(spec, options.batch)
    base = vit_torch.eager(checkpoint, options.threads)
    ladder = Ladder(
        [theirs(EAGER, "what a user has: the model as timm makes it", lambda: base, pixels)],
        floor_of(checkpoint, spec, bundle, limits, options.batch),
    )
    rivals: list[tuple[str, str, Callable[[], Judge], dict[str, Any]]] = [
        ("timm eager bf16", "weights and activations in bf16",
         partial(vit_torch.eager, checkpoint, options.threads, "bfloat16"),
         {"precision": "bf16", "before": EAGER}),
        (COMPILED, "torch.compile around the model",
         partial(vit_torch.compiled, checkpoint, options.threads, pixels), {"before": EAGER}),
        ("plain onnxruntime fp32", "the graph in a default session, logits alone",
         partial(plain, bundle, options.threads), {"before": EAGER}),
    ]  # fmt: skip
    for name, technique, opened, more in rivals:
        if name in options.without:
            ladder.left_out[name] = "left out, as asked: it takes minutes to begin"
        else:
            ladder.add(name, partial(theirs, name, technique, opened, pixels, **more))
    ladder.add("onnxruntime fp32", partial(
        ours, "onnxruntime fp32", "our session and the whole graph, with its map of attention",
        bundle, ORT, "fp32", options, pixels, before="plain onnxruntime fp32",
    ))  # fmt: skip
    before = "plain onnxruntime fp32"
    for precision, technique in _TECHNIQUES.items():
        if precision in bundle.parts["classifier"].files:
            name = f"openvino {precision}"
            ladder.add(name, partial(ours, name, technique, bundle, OPENVINO, precision, options,
                                     pixels, before=before, lossy=precision == PRUNED))  # fmt: skip
            before = name
    yield ladder


def photographs(spec: ClassifierSpec, count: int) -> Floats:
    """`count` seeded pictures of soft blobs, prepared: float32 [count, 3, H, W].

    What is on them costs nothing and gains nothing; they differ so that answers do.
    """
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 9, 12, 3), dtype=np.uint8)
    pictures = (Image.fromarray(one).resize(_PHOTOGRAPH, Image.Resampling.BICUBIC) for one in small)
    return np.stack([preprocess(picture, spec) for picture in pictures])


def same_answers(base: Floats, own: Floats) -> dict[str, float]:
    """The largest change of a probability (without temperature) between logits [n, classes]."""
    if base.shape != own.shape:
        return {"probability": 1.0, "wrong": 1.0}
    change = float(np.abs(_shares(base) - _shares(own)).max())
    return {"probability": change, "wrong": float(change > SAME)}


def theirs(
    name: str, technique: str, opened: Callable[[], Judge], pixels: Floats, **more: Any
) -> Rung:
    """A rung that somebody else's model judges."""
    one = opened()
    return Rung(name, technique, lambda _: Made(one.judge(pixels)), images=len(pixels),
                opened_s=one.opened_s, evidence=one.evidence, **more)  # fmt: skip


def plain(bundle: Bundle, threads: int) -> Judge:
    """Plain ONNX Runtime as a side that judges."""
    began = time.perf_counter()
    judge = sessions.classifier_of(bundle, threads)
    found = {"providers": sessions.PROVIDERS, "options": "defaults"}
    return Judge(judge, time.perf_counter() - began, lambda: found)


def ours(
    name: str, technique: str, bundle: Bundle, engine: str, precision: str, options: Options,
    pixels: Floats, **more: Any,
) -> Rung:  # fmt: skip
    """A rung that our classifier judges.

    Raises:
        EngineError: the engine cannot be had in this precision.
    """
    began = time.perf_counter()
    classifier = Classifier.open(bundle, engine, precision, threads=options.threads, gated=False)
    opened_s = time.perf_counter() - began
    prepared = [Prepared(one) for one in pixels]

    def make(_: int) -> Made:
        found = classifier.judge(prepared)
        return Made(np.array([one.prediction.logits for one in found], np.float32))

    kind = "int8" if precision.startswith("int8") else precision
    return Rung(
        name, technique, make, ours=True, precision=kind, images=len(pixels), opened_s=opened_s,
        evidence=lambda: evidence_of({"classifier": classifier.engine})["classifier"], **more,
    )  # fmt: skip


def floor_of(
    checkpoint: Path, spec: ClassifierSpec, bundle: Bundle, limits: Limits, batch: int
) -> Floors:
    """Precision -> the floor of a call: logits alone, nothing of the map of attention, and all
    tokens, so that a tier that drops some may pass it."""
    one = work_of(vit_torch.module(checkpoint), spec.input_size)
    work = Work(one.linear * batch, one.attention * batch)
    weights = {name: file.bytes + sum(data.bytes for data in file.data)
               for name, file in bundle.parts["classifier"].files.items()}  # fmt: skip

    def floor(rung: Rung) -> Mapping[str, Any]:
        precision = rung.precision
        least = limits.least(work, weights.get(precision, weights["fp32"]), precision)
        seconds = least.as_quantized if precision == "int8" else least.seconds
        return {"ms": 1e3 * seconds, "precision": precision,
                "gflop": round(work.flops / 1e9, 3)}  # fmt: skip

    return floor


def work_of(module: Any, size: tuple[int, int, int]) -> Work:
    """Operations of torch's module for one picture, by torch's own counter."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention; as plain products it does.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        module(torch.zeros(1, *size))
    kinds = counter.get_flop_counts()["Global"]
    attention = sum(flops for kind, flops in kinds.items() if "bmm" in str(kind))
    return Work(int(counter.get_total_flops()) - attention, attention)


def _shares(logits: Floats) -> Floats:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))
