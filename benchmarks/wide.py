"""Checkpoints of FLUX.1's width with random weights, and commands measured over several of them.

`--blocks DOUBLE,SINGLE` are a transformer's: 5,10 are 3 billion weights, 10,19 are 6 and 19,38 are
FLUX.1 itself.

    >>> write_checkpoint(Path("scratch/checkpoint"), Path("models/mini"), 5, 10)
    3192193344
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from dermaflux import files

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
PROBE: Final = 4 * 2**30
_CHUNK: Final = 2**24


class Sized(Protocol):
    """What a command took at one size. Rates are in MB (10**6) a second."""

    weights: int
    seconds: float
    peak_bytes: int
    read_and_written_mb_s: float
    disk_write_mb_s: float


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


def over_sizes(
    options: argparse.Namespace, name: str, measure: Callable[[Path, tuple[int, int]], Any]
) -> None:
    """Measure one size after the other, each in a folder of its own; print all as one JSON object.

    `--out` is written after each, and has those so far under `name`.
    """
    result: dict[str, Any] = {"cores": os.cpu_count(), name: []}
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            made = measure(Path(folder), blocks)
        result[name].append(asdict(made))
        found: Sized = made
        print(
            f"{found.weights / 1e9:5.1f} billion weights: peak {found.peak_bytes / 1e9:.2f} GB, "
            f"{found.seconds:.0f} s, {found.read_and_written_mb_s:.0f} MB/s read and written "
            f"(the disk alone writes {found.disk_write_mb_s:.0f})",
            file=sys.stderr,
        )
        if options.out is not None:
            files.write(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result), flush=True)


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The options that all such benchmarks have."""
    made = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    made.add_argument(
        "--blocks", type=_pair, action="append", required=True, help="DOUBLE,SINGLE; repeatable"
    )
    made.add_argument(
        "--base", type=Path, default=Path("models/mini"), help="the other parts' checkpoint"
    )
    made.add_argument("--work", type=Path, help="where to write; default: the system's choice")
    made.add_argument("--out", type=Path, help="a JSON file of the figures")
    return made


def bytes_in(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _pair(text: str) -> tuple[int, int]:
    double, single = (int(number) for number in text.split(","))
    return double, single


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """bf16 numbers of either sign from 0.0156 to 0.031: their digits are random, their size is
    that of trained weights, and they are made as fast as a disk takes them."""
    import torch

    digits = random.integers(0, 2**16, int(np.prod(shape)), np.uint16)
    bits = (digits & np.uint16(0x807F)) | np.uint16(0x3C80)
    return torch.from_numpy(bits).view(torch.bfloat16).reshape(shape)
