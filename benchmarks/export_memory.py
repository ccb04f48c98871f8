"""Peak memory and speed of the export, from outside, at several sizes of the transformer.

    python -m benchmarks.export_memory --blocks 5,10 --blocks 10,19 --calibrate
    python -m benchmarks.export_memory --blocks 19,38 --out benchmarks/results/export_memory.json

`--blocks DOUBLE,SINGLE` are those of a transformer of FLUX.1's width: 5,10 are 3 billion weights,
10,19 are 6 and 19,38 are FLUX.1 itself, which needs 38 GB of disk. Random weights in bf16 are
written to shards, the other parts are those of `--base`, and `python -m export` runs as a process
of its own, without comparing. The peak is the largest resident memory that the system saw of that
process, mapped files included. Beside the seconds stands the disk's own speed: how fast the same
number of bytes, up to 4 GB, is written there with nothing else to do. What was written is removed.
Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
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

_PASSES: Final = 2


@dataclass(frozen=True)
class Calibration:
    """A calibration with all weights on the disk: `passes` of the transformer over one image."""

    passes: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Measured:
    """One export. Bytes are of the transformer alone; rates are in MB (10**6) a second."""

    blocks: tuple[int, int]
    weights: int
    precision: str
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_bytes: int
    read_and_written_mb_s: float
    disk_write_mb_s: float
    calibration: Calibration | None = None


def measure(
    work: Path,
    base: Path,
    blocks: tuple[int, int],
    precision: str,
    shape: Mapping[str, Any] = WIDE,
    calibrate: bool = False,
) -> Measured:
    """Write a checkpoint into `work`, export it, and remove both; `calibrate` it first, if asked.

    Raises:
        EngineError: the export failed; with its last words.
    """
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    try:
        weights = write_checkpoint(checkpoint, base, *blocks, shape)
        table = work / "scales.npz"
        # Ranges that nobody measured: the bytes written are as many, and no image is made.
        assumed = ["export.quantize", "--calibrate", str(checkpoint), "--assume", "8"]
        _run([*assumed, "--out", str(table)])
        calibration = _calibration(work, checkpoint) if calibrate else None
        started = time.monotonic()
        peak = _run(
            [
                *("export", str(checkpoint), "--out", str(bundle), "--prompts", "0"),
                *("--precision", precision, "--calibration", str(table)),
            ]
        )
        os.sync()
        seconds = time.monotonic() - started
        read = bytes_in(checkpoint / "transformer")
        written = bytes_in(bundle / "transformer")
        shutil.rmtree(bundle)
        return Measured(
            blocks=blocks,
            weights=weights,
            precision=precision,
            bytes_in=read,
            bytes_out=written,
            seconds=round(seconds, 1),
            peak_bytes=peak,
            read_and_written_mb_s=round((read + written) / seconds / 1e6, 1),
            disk_write_mb_s=round(disk_rate(work, min(written, PROBE)) / 1e6, 1),
            calibration=calibration,
        )
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)


def _calibration(work: Path, checkpoint: Path) -> Calibration:
    """Of one image in as few steps as show that memory does not grow with them."""
    requests, table = work / "requests.jsonl", work / "measured.npz"
    # One of another model is not replaced.
    table.unlink(missing_ok=True)
    requests.write_text(json.dumps({"prompt": "a nevus", "steps": _PASSES}) + "\n")
    started = time.monotonic()
    peak = _run(
        [
            *("export.quantize", "--calibrate", str(checkpoint), "--offload", "--dtype", "bf16"),
            *("--requests", str(requests), "--out", str(table)),
        ]
    )
    return Calibration(_PASSES, round(time.monotonic() - started, 1), peak)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    options = _parser().parse_args(arguments)

    def one(work: Path, blocks: tuple[int, int]) -> Measured:
        return measure(work, options.base, blocks, options.precision, calibrate=options.calibrate)

    return ended(lambda: over_sizes(options, "exports", one))


def _run(arguments: Sequence[str]) -> int:
    """Run a command of ours; the largest resident memory of it, in bytes."""
    return peak_of([sys.executable, "-m", *arguments])


def _parser() -> argparse.ArgumentParser:
    made = parser(
        "benchmarks.export_memory", "Measure the export's peak memory and speed at several sizes."
    )
    made.add_argument("--precision", default="fp8", help="default: fp8")
    made.add_argument(
        "--calibrate",
        action="store_true",
        help="measure a calibration from the disk as well (export.quantize --calibrate --offload)",
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
