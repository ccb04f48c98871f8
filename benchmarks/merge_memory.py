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

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.export_memory import WIDE, disk_rate, write_checkpoint
from benchmarks.peak import peak_of
from dermaflux import files
from dermaflux.command import ended

RANK: Final = 64
_PROBE: Final = 4 * 2**30


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
        bytes_in, bytes_out = _bytes(checkpoint / "transformer"), _bytes(merged / "transformer")
        assert bytes_out >= 2 * weights, (bytes_out, weights)
        shutil.rmtree(merged)
        return Measured(
            blocks=blocks,
            weights=weights,
            layers=layers,
            rank=rank,
            bytes_in=bytes_in,
            adapter_bytes=adapter.stat().st_size,
            largest_tensor_bytes=largest,
            seconds=round(seconds, 1),
            peak_bytes=peak,
            read_and_written_mb_s=round((bytes_in + bytes_out) / seconds / 1e6, 1),
            disk_write_mb_s=round(disk_rate(work, min(bytes_out, _PROBE)) / 1e6, 1),
        )
    finally:
        for folder in (checkpoint, merged):
            shutil.rmtree(folder, ignore_errors=True)
        adapter.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    options = _parser().parse_args(arguments)
    return ended(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure one size after the other; `--out` is written after each, and has those so far."""
    result: dict[str, Any] = {"cores": os.cpu_count(), "merges": []}
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            found = measure(Path(folder), options.base, blocks)
        result["merges"].append(asdict(found))
        print(
            f"{found.weights / 1e9:5.1f} billion weights: peak {found.peak_bytes / 1e9:.2f} GB, "
            f"{found.seconds:.0f} s, {found.read_and_written_mb_s:.0f} MB/s read and written "
            f"(the disk alone writes {found.disk_write_mb_s:.0f})",
            file=sys.stderr,
        )
        if options.out is not None:
            files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result), flush=True)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _pair(text: str) -> tuple[int, int]:
    double, single = (int(number) for number in text.split(","))
    return double, single


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.merge_memory",
        description="Measure merging's peak memory and speed at several sizes.",
    )
    parser.add_argument(
        "--blocks", type=_pair, action="append", required=True, help="DOUBLE,SINGLE; repeatable"
    )
    parser.add_argument(
        "--base", type=Path, default=Path("models/mini"), help="the other parts' checkpoint"
    )
    parser.add_argument("--work", type=Path, help="where to write; default: the system's choice")
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
