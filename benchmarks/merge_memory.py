"""Peak memory and speed of merging an adapter, from outside, at several sizes of the transformer.

    python -m benchmarks.merge_memory --blocks 5,10
    python -m benchmarks.merge_memory --blocks 5,10 --blocks 19,38 \\
        --out benchmarks/results/merge_memory.json

`--blocks DOUBLE,SINGLE` are those of a transformer of FLUX.1's width: 5,10 are 3 billion weights,
19,38 are FLUX.1 itself, which needs 55 GB of disk. Random weights in bf16 are written to shards,
and random factors of rank 64 for all linears of all blocks, the trainer's default; the other parts
are those of `--base`. `python -m training.merge` runs as a process of its own. The peak is the
largest resident memory that the system saw of it, mapped files included; beside it stand the
largest tensor and the disk's own speed. What was written is removed. Progress goes to stderr; the
last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.peak import peak_of
from benchmarks.wide import PROBE, WIDE, bytes_in, disk_rate, over_sizes, parser, write_checkpoint
from dermaflux.command import ended

RANK: Final = 64


@dataclass(frozen=True)
class Measured:
    """One merge. Bytes are of the transformer alone; rates are in MB (10**6) a second."""

    blocks: tuple[int, int]
    weights: int
    layers: int
    rank: int
    bytes_in: int
    adapter_bytes: int
    largest_tensor_bytes: int
    seconds: float
    peak_bytes: int
    read_and_written_mb_s: float
    disk_write_mb_s: float


def write_adapter(file: Path, checkpoint: Path, rank: int = RANK) -> tuple[int, int]:
    """Random factors in bf16 for every linear of the blocks of a checkpoint's transformer, in
    diffusers' layout; how many layers, and the bytes of the largest tensor that they change."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(
            FluxTransformer2DModel.load_config(checkpoint / "transformer")
        )
    draw = torch.Generator().manual_seed(0)
    content: dict[str, Any] = {}
    largest = 0
    for name, one in model.named_modules():
        if isinstance(one, torch.nn.Linear) and "transformer_blocks" in name:
            largest = max(largest, 2 * math.prod(one.weight.shape))
            for key, shape in (("A", (rank, one.in_features)), ("B", (one.out_features, rank))):
                factor = torch.randn(shape, generator=draw, dtype=torch.float32) / 64
                content[f"transformer.{name}.lora_{key}.weight"] = factor.bfloat16()
    save_file(content, file, {"licences": json.dumps([["random numbers", "CC0-1.0"]])})
    return len(content) // 2, largest


def measure(
    work: Path,
    base: Path,
    blocks: tuple[int, int],
    shape: Mapping[str, Any] = WIDE,
    rank: int = RANK,
) -> Measured:
    """Write a checkpoint and an adapter into `work`, merge them, and remove all three.

    Raises:
        EngineError: the merge failed; with its last words.
    """
    checkpoint, adapter, merged = work / "checkpoint", work / "a.safetensors", work / "merged"
    try:
        weights = write_checkpoint(checkpoint, base, *blocks, shape)
        layers, largest = write_adapter(adapter, checkpoint, rank)
        os.sync()
        started = time.monotonic()
        peak = peak_of(
            [
                *(sys.executable, "-m", "training.merge", str(checkpoint), str(adapter)),
                *("--out", str(merged)),
            ]
        )
        os.sync()
        seconds = time.monotonic() - started
        read, written = bytes_in(checkpoint / "transformer"), bytes_in(merged / "transformer")
        assert written >= 2 * weights, (written, weights)
        shutil.rmtree(merged)
        return Measured(
            blocks=blocks,
            weights=weights,
            layers=layers,
            rank=rank,
            bytes_in=read,
            adapter_bytes=adapter.stat().st_size,
            largest_tensor_bytes=largest,
            seconds=round(seconds, 1),
            peak_bytes=peak,
            read_and_written_mb_s=round((read + written) / seconds / 1e6, 1),
            disk_write_mb_s=round(disk_rate(work, min(written, PROBE)) / 1e6, 1),
        )
    finally:
        for folder in (checkpoint, merged):
            shutil.rmtree(folder, ignore_errors=True)
        adapter.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    options = parser(
        "benchmarks.merge_memory", "Measure merging's peak memory and speed at several sizes."
    ).parse_args(arguments)
    return ended(
        lambda: over_sizes(
            options, "merges", lambda work, blocks: measure(work, options.base, blocks)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
