"""Draw many images once: every one is kept on disk, by the weights and the request it came from.

>>> sampled(pipeline, [("dermoscopic image of a benign lesion", 7)], work / fingerprint(folder))
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dermaflux import files
from dermaflux.pipeline import Pipeline
from training.figures import Pixels

_CHUNK = 32  # images a file: what a stopped report loses at most
_GENERATOR = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
              "scheduler")  # fmt: skip

Asked = Sequence[tuple[str, int]]
"""(prompt, seed) of every image."""


def fingerprint(folder: Path, names: Sequence[str] = _GENERATOR) -> str:
    """Sixteen hex digits of the content of files and folders below `folder`."""
    digest = hashlib.sha256()
    for name in names:
        found = folder / name
        for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
            if file.is_file():
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def sampled(
    pipeline: Pipeline, asked: Asked, folder: Path, guidance: float | None = None
) -> Pixels:
    """Draw [N, S, S, 3] at the pipeline's defaults, or read what `folder` already holds."""
    requests = [pipeline.request(text, seed, guidance=guidance) for text, seed in asked]
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Pixels] = []
    for start in tqdm(range(0, len(requests), _CHUNK), desc="images", unit_scale=_CHUNK):
        some = requests[start : start + _CHUNK]
        key = hashlib.sha256(repr(some).encode()).hexdigest()[:24]
        file = folder / f"{key}.npz"
        if not file.is_file():
            stream = io.BytesIO()
            np.savez_compressed(stream, images=np.stack(pipeline.generate(some)))
            files.write(file, stream.getvalue())
        with np.load(file) as held:
            parts.append(held["images"])
    return np.concatenate(parts)
