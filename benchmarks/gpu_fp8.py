"""What each kind of layer costs in accuracy when it is in fp8: the reason for the list of those.

    python -m benchmarks.gpu_fp8 models/mini
    python -m benchmarks.gpu_fp8 models/mini --items 16 --out benchmarks/results/fp8_kinds.json

Emulated on any machine: numbers of fp8, products in float32, all else exact. For each kind alone,
for all, and for all but one: the error of the velocity relative to float32, over random items and
timesteps of a schedule. A kind is left out where it has much of the error and little of the work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks import machine
from benchmarks.results_file import finish
from dermaflux import flow
from dermaflux.checkpoint import Checkpoint
from dermaflux.command import at_least, ended, option, parsed
from dermaflux.engines.flux_engine import FluxEngine, opened
from dermaflux.engines.flux_fp8 import KINDS, LOW
from dermaflux.flow import Schedule

_WORK: Final = {"qkv": 3, "out": 1, "up": 4, "down": 4, "single.qkv_up": 7, "single.down": 5}
"""Multiply-adds a token of a layer in a block, in squares of the width."""


@dataclass(frozen=True)
class Settings:
    """What `python -m benchmarks.gpu_fp8` is asked for."""

    checkpoint: Path = option("a checkpoint's folder")
    items: int = option("items, each at another timestep", 8)
    out: Path | None = option("write the result here too", None)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(Settings, "python -m benchmarks.gpu_fp8", __doc__, arguments)
    return ended(lambda: run(settings, sys.argv[1:] if arguments is None else arguments))


def run(settings: Settings, words: Sequence[str]) -> None:
    """Sweep, and print the result as one line of JSON."""
    at_least(settings, {"items": 1})
    checkpoint = Checkpoint.open(settings.checkpoint)
    folder = checkpoint.path / "transformer"
    given = _items(checkpoint, settings.items)
    exact = _velocity(folder, (), given)

    def error(low: Collection[str]) -> dict[str, float]:
        off = _velocity(folder, low, given) - exact
        each = np.sqrt((off**2).mean(axis=(1, 2)) / (exact**2).mean(axis=(1, 2)))
        return {"error": float(np.sqrt((each**2).mean())), "worst": float(each.max())}

    work = _work(json.loads((folder / "config.json").read_text()), given)
    kinds = {}
    for kind in KINDS:
        rest = [other for other in KINDS if other != kind]
        kinds[kind] = {
            **error([kind]),
            "error_of_the_others": error(rest)["error"],
            "share_of_linear_work": work[kind],
        }
        print(f"{kind}: {kinds[kind]}", file=sys.stderr)
    result: dict[str, Any] = {
        "environment": machine.environment(),
        "checkpoint": str(settings.checkpoint),
        "items": settings.items,
        "all": error(KINDS),
        "chosen": {"kinds": list(LOW), **error(LOW)},
        "kinds": kinds,
    }
    finish("gpu_fp8", result, words, settings.out)


def _items(checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """Noise as tokens and random text, each item at another step of the default schedule."""
    defaults, model = checkpoint.defaults, checkpoint.model
    shape = flow.latent_shape(defaults.height, defaults.width, model.latent_channels, model.scale)
    config = json.loads((checkpoint.path / "transformer/config.json").read_text())
    tokens = flow.pack(np.stack([flow.noise(seed, shape) for seed in range(count)]))
    sigmas = Schedule.from_config(checkpoint.scheduler).sigmas(count, tokens.shape[1])[:-1]
    rng = np.random.default_rng(0)
    text = (count, model.text_length, config["joint_attention_dim"])
    pooled = (count, config["pooled_projection_dim"])
    given = {
        "hidden_states": tokens,
        "encoder_hidden_states": rng.standard_normal(text, dtype=np.float32),
        "pooled_projections": rng.standard_normal(pooled, dtype=np.float32),
        "timestep": sigmas,
        "img_ids": flow.image_ids(*shape[1:]),
        "txt_ids": flow.text_ids(model.text_length),
    }
    if model.guidance_embeds:
        given["guidance"] = np.full(count, defaults.guidance, np.float32)
    return given


def _velocity(folder: Path, low: Collection[str], given: Mapping[str, Any]) -> Any:
    engine: FluxEngine = opened(folder, torch.float32, low=low)
    return engine.run(given)["out_hidden_states"].astype(np.float64)


def _work(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    """Each kind's share of the multiply-adds of a step; modulation and text come once a request."""
    _, image, channels = given["hidden_states"].shape
    text = given["encoder_hidden_states"].shape[1]
    d = config["attention_head_dim"] * config["num_attention_heads"]
    tokens = {"image": image, "text": text, "single": image + text}
    counts = {"image_in": image * channels * d, "out": image * channels * d}
    counts |= {"text_in": 0, "modulation": 0}
    for kind in LOW:
        part, layer = kind.split(".")
        blocks = config["num_single_layers" if part == "single" else "num_layers"]
        work = _WORK[kind] if part == "single" else _WORK[layer]
        counts[kind] = blocks * tokens[part] * work * d * d
    return {kind: counts[kind] / sum(counts.values()) for kind in KINDS}


if __name__ == "__main__":
    sys.exit(main())
