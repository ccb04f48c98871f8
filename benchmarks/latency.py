"""Latency of one image in process, by stage, every engine and precision of a bundle side by side.

    python -m benchmarks.latency --bundle bundles/mini --checkpoint models/mini
    python -m benchmarks.latency --out benchmarks/results/latency.json

The variants take turns in every round, so that a noisy machine disturbs all alike; figures are
medians, and speed is a ratio to eager torch of the same round. Beside them stands the floor: the
transformer's floating-point operations over the rate of a large float32 matrix product on this
machine. Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.machine import environment, matmul_rate
from dermaflux import files, flow
from dermaflux.bundle import Bundle
from dermaflux.command import ended
from dermaflux.engines import EAGER, OPENVINO, ORT
from dermaflux.errors import EngineError
from dermaflux.images import encode_png
from dermaflux.pipeline import Pipeline

__all__ = ["environment", "matmul_rate", "transformer_flops", "variants"]

STAGES: Final = ("encode", "denoise", "decode", "png", "total")


def transformer_flops(config: Mapping[str, Any], image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one forward of one item, 2 per multiply-add.

    Counted: linear layers and both attention products; norms and activations are not. `config` is
    diffusers' FluxTransformer2DModel's; a block's linears are 12 d^2 per token (3 QKV, 1 output,
    8 MLP), its modulation 6 d^2 (double, per stream) or 3 d^2 (single) per item.
    """
    d = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = image_tokens + text_tokens
    layers = config["num_layers"] + config["num_single_layers"]
    linear = layers * 12 * d * d * tokens
    modulation = (config["num_layers"] * 12 + config["num_single_layers"] * 3 + 2) * d * d
    edges = (
        2 * config["in_channels"] * image_tokens + config["joint_attention_dim"] * text_tokens
    ) * d
    attention = layers * 2 * tokens * tokens * d
    return int(2 * (linear + modulation + edges + attention))


def variants(bundle: Bundle, checkpoint: Path | None, threads: int | None) -> dict[str, Pipeline]:
    """Every engine and precision that can run here, by name; eager first where it can."""
    found: dict[str, Pipeline] = {}
    if checkpoint is not None:
        found[EAGER] = Pipeline.from_checkpoint(checkpoint, threads=threads)
    for engine in (ORT, OPENVINO):
        for precision in bundle.parts["transformer"].files:
            try:
                pipeline = Pipeline.open(
                    bundle, engine=engine, precision=precision, threads=threads
                )
            except EngineError as error:
                print(f"left out {engine} {precision}: {error}", file=sys.stderr)
                continue
            if pipeline.engines["transformer"].precision == precision:
                found[f"{engine} {precision}"] = pipeline
    return found


def one_image(pipeline: Pipeline, seed: int, steps: int | None) -> dict[str, float]:
    """Seconds by stage for one image of the bundle's size."""
    request = pipeline.request(
        "dermoscopic image of a malignant lesion, melanoma", seed=seed, steps=steps
    )
    shape = flow.latent_shape(
        request.height, request.width, pipeline.model.latent_channels, pipeline.model.scale
    )
    marks = [time.perf_counter()]
    text = pipeline.encode([request.prompt])
    marks.append(time.perf_counter())
    latents = pipeline.denoise(
        flow.noise(request.seed, shape)[None], text, steps=[request.steps],
        guidance=[request.guidance],
    )  # fmt: skip
    marks.append(time.perf_counter())
    (pixels,) = pipeline.decode(latents)
    marks.append(time.perf_counter())
    encode_png(pixels, pipeline.record(request))
    marks.append(time.perf_counter())
    spent = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    return dict(zip(STAGES, [*spent, sum(spent)], strict=True))


def measure(
    pipelines: Mapping[str, Pipeline], rounds: int, steps: int | None
) -> dict[str, list[dict[str, float]]]:
    """`rounds` of one image by every variant in turn, after two that do not count."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for number in range(-2, rounds):
        for name, pipeline in pipelines.items():
            spent = one_image(pipeline, max(number, 0), steps)
            if number >= 0:
                times[name].append(spent)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return times


def summary(
    times: Mapping[str, Sequence[Mapping[str, float]]], floor: float
) -> dict[str, dict[str, float]]:
    """Medians in ms by stage, the 90th percentile, ratio to eager, share of the floor reached."""
    table = {}
    for name, rows in times.items():
        figures = {f"{s}_ms": 1e3 * statistics.median(r[s] for r in rows) for s in STAGES}
        figures["total_p90_ms"] = 1e3 * float(np.quantile([r["total"] for r in rows], 0.9))
        figures["floor_reached"] = floor / (figures["denoise_ms"] / 1e3)
        if EAGER in times:
            figures["times_eager"] = statistics.median(
                base["total"] / row["total"] for base, row in zip(times[EAGER], rows, strict=True)
            )
        table[name] = {key: round(value, 3) for key, value in figures.items()}
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, default=Path("bundles/mini"))
    parser.add_argument("--checkpoint", type=Path, help="weights for eager torch, to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, help="write the result here too")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} measures nothing; use 1 or more")
    return ended(lambda: run(options, arguments or sys.argv[1:]))


def run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure, and print the result as one line of JSON; `words` are those of the command line."""
    bundle = Bundle.open(options.bundle)
    steps = options.steps or bundle.defaults.steps
    config = json.loads(bundle.file("transformer/config.json").read_text())
    image = bundle.defaults.height * bundle.defaults.width // (2 * bundle.model.scale) ** 2
    flops = transformer_flops(config, image, bundle.model.text_length) * steps
    rate = matmul_rate("fp32") or float("nan")
    times = measure(variants(bundle, options.checkpoint, options.threads), options.rounds, steps)
    result = {
        "benchmark": "latency",
        "command": " ".join(["python -m benchmarks.latency", *words]),
        "environment": environment(),
        "bundle": {"name": bundle.name, "id": bundle.id},
        "size": [bundle.defaults.height, bundle.defaults.width],
        "steps": steps,
        "rounds": options.rounds,
        "floor": {
            "transformer_gflop": round(flops / 1e9, 2),
            "matmul_gflops": round(rate / 1e9, 1),
            "denoise_ms": round(1e3 * flops / rate, 2),
        },
        "variants": summary(times, flops / rate),
    }
    if options.out is not None:
        files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
