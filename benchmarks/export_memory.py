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
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.peak import peak_of
from dermaflux import files
from dermaflux.command import ended

WIDE: Final[Mapping[str, Any]] = {
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "patch_size": 1,
}
"""FLUX.1-dev's transformer, but for its numbers of blocks."""
_ENDS: Final = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
_SHARD: Final = 2**30
_PROBE: Final = 4 * 2**30
_PASSES: Final = 2
_CHUNK: Final = 2**24


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


def write_checkpoint(
    folder: Path, base: Path, double: int, single: int, shape: Mapping[str, Any] = WIDE
) -> int:
    """A checkpoint of random weights in bf16, all but the transformer linked from `base`; returns
    how many weights its transformer has."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for entry in base.iterdir():
        if entry.name != "transformer":
            (folder / entry.name).symlink_to(entry.resolve())
    given = json.loads((base / "transformer/config.json").read_text())
    # So that the base's text encoders and autoencoder fit it.
    ends = {name: given[name] for name in _ENDS}
    config = {**shape, **ends, "num_layers": double, "num_single_layers": single}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    model.save_config(folder / "transformer")
    random = np.random.default_rng(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in shapes.items():
        filled += 2 * int(np.prod(size))
        if filled > _SHARD:
            shards.append([])
            filled = 2 * int(np.prod(size))
        shards[-1].append(name)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: _weights(random, shapes[name]) for name in names}
        save_file(content, folder / "transformer" / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(int(np.prod(size)) for size in shapes.values())


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
        bytes_in = _bytes(checkpoint / "transformer")
        bytes_out = _bytes(bundle / "transformer")
        shutil.rmtree(bundle)
        return Measured(
            blocks=blocks,
            weights=weights,
            precision=precision,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            seconds=round(seconds, 1),
            peak_bytes=peak,
            read_and_written_mb_s=round((bytes_in + bytes_out) / seconds / 1e6, 1),
            disk_write_mb_s=round(disk_rate(work, min(bytes_out, _PROBE)) / 1e6, 1),
            calibration=calibration,
        )
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)


def _calibration(work: Path, checkpoint: Path) -> Calibration:
    """Of one image in as few steps as show that memory does not grow with them."""
    requests = work / "requests.jsonl"
    requests.write_text(json.dumps({"prompt": "a nevus", "steps": _PASSES}) + "\n")
    started = time.monotonic()
    peak = _run(
        [
            *("export.quantize", "--calibrate", str(checkpoint), "--offload", "--dtype", "bf16"),
            *("--requests", str(requests), "--out", str(work / "measured.npz")),
        ]
    )
    return Calibration(_PASSES, round(time.monotonic() - started, 1), peak)


def disk_rate(folder: Path, count: int) -> float:
    """Bytes a second that the disk takes: `count` random ones, and until they are on it."""
    chunk = np.random.default_rng(1).bytes(_CHUNK)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=folder) as stream:
        for _ in range(max(1, count // _CHUNK)):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return max(1, count // _CHUNK) * _CHUNK / (time.monotonic() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status."""
    options = _parser().parse_args(arguments)
    return ended(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure one size after the other; `--out` is written after each, and has those so far."""
    result: dict[str, Any] = {"cores": os.cpu_count(), "exports": []}
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            found = measure(
                Path(folder),
                options.base,
                blocks,
                options.precision,
                calibrate=options.calibrate,
            )
        result["exports"].append(asdict(found))
        print(
            f"{found.weights / 1e9:5.1f} billion weights: peak {found.peak_bytes / 1e9:.2f} GB, "
            f"{found.seconds:.0f} s, {found.read_and_written_mb_s:.0f} MB/s read and written "
            f"(the disk alone writes {found.disk_write_mb_s:.0f})",
            file=sys.stderr,
        )
        if options.out is not None:
            files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result), flush=True)


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """bf16 numbers of either sign from 0.0156 to 0.031: their digits are random, their size is
    that of trained weights, and they are made as fast as a disk takes them."""
    import torch

    digits = random.integers(0, 2**16, int(np.prod(shape)), np.uint16)
    bits = (digits & np.uint16(0x807F)) | np.uint16(0x3C80)
    return torch.from_numpy(bits).view(torch.bfloat16).reshape(shape)


def _run(arguments: Sequence[str]) -> int:
    """Run a command of ours; the largest resident memory of it, in bytes."""
    return peak_of([sys.executable, "-m", *arguments])


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _pair(text: str) -> tuple[int, int]:
    double, single = (int(number) for number in text.split(","))
    return double, single


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export_memory",
        description="Measure the export's peak memory and speed at several sizes.",
    )
    parser.add_argument(
        "--blocks", type=_pair, action="append", required=True, help="DOUBLE,SINGLE; repeatable"
    )
    parser.add_argument("--precision", default="fp8", help="default: fp8")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure a calibration from the disk as well (export.quantize --calibrate --offload)",
    )
    parser.add_argument(
        "--base", type=Path, default=Path("models/mini"), help="the other parts' checkpoint"
    )
    parser.add_argument("--work", type=Path, help="where to write; default: the system's choice")
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
